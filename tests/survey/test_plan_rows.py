"""The plan: rows that fit, how far they reach, shares of devices, and where shapes come from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from fake_hub import FakeHub, serving
from quantized_files import LAYOUTS, write_quantized
from qwenkit.errors import ConfigError, ModelNotFoundError, NetworkError, UsageError
from qwenkit.formats.plan import BITSANDBYTES_KINDS, WeightPlan
from qwenkit.load import load
from qwenkit.survey import plan_source
from qwenkit.survey.plan import Choice, Plan, make_plan
from qwenkit.survey.plan_memory import Workload, estimate
from qwenkit.survey.plan_source import Shape, find_shape
from qwenkit.survey.plan_split import layer_devices, split_advice, stages
from qwenkit.survey.plan_weights import weigh
from tiny import CONFIG, write_tiny_checkpoint

GIB = 2**30
SEVEN = "Qwen/Qwen2-7B-Instruct"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No address answers, and nothing is cached."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": bytes(5000)}
    with serving(FakeHub("Some/Model", files)) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        yield served


def plan(
    name: str = SEVEN, *, free: int | None = 12 * GIB, work: Workload | None = None, **how: Any
) -> Plan:
    return make_plan(
        find_shape(name, offline=True),
        work or Workload(users=4, tokens=8192),
        Choice(**how),
        process_bytes=GIB // 3,
        available_bytes=free,
        machine_bytes=16 * GIB,
    )


def test_the_row_that_fits_and_loses_least_is_recommended() -> None:
    for free, best in ((40, "auto"), (12, "int8"), (9, "int4"), (2, None)):
        made = plan(free=free * GIB)
        assert [row.weights for row in made.rows] == ["auto", "int8", "int4", "fp32"]
        assert made.recommended == best
        for row in made.rows:
            assert row.fits == (row.memory.peak_bytes <= free * GIB)


def test_bits_per_weight() -> None:
    bits = {row.weights: round(row.bits_per_weight, 2) for row in plan().rows}
    assert bits == {"auto": 16.0, "int8": 8.13, "int4": 5.02, "fp32": 32.0}
    (row,) = plan(weights="int4", group_size=128, head_weights="int4").rows
    assert round(row.bits_per_weight, 2) == 4.13


@pytest.mark.parametrize("free_gib", [6, 9, 12, 20])
def test_what_is_said_to_fit_fits_and_no_more(free_gib: int) -> None:
    made = plan(free=free_gib * GIB)
    shape = find_shape(SEVEN, offline=True)

    weights = {
        row.weights: weigh(
            shape.architecture, shape.config, WeightPlan(row.weights), shape.storage_of
        )
        for row in made.rows
    }

    def peak(kind: str, users: int, tokens: int) -> int:
        work = replace(made.work, users=users, tokens=tokens)
        return estimate(shape.config, weights[kind], work, process_bytes=GIB // 3).peak_bytes

    for row in made.rows:
        longest, users = row.longest_tokens, row.most_users
        assert longest is not None
        assert users is not None
        if longest:
            assert peak(row.weights, 4, longest) <= made.available_bytes
        if longest < made.context_tokens:
            assert peak(row.weights, 4, longest + 16) > made.available_bytes
        if users:
            assert peak(row.weights, users, 8192) <= made.available_bytes
        if users < 64:
            assert peak(row.weights, users + 1, 8192) > made.available_bytes


def test_an_unknown_limit_is_no_answer() -> None:
    made = plan(free=None)
    assert made.recommended is None
    assert {(r.fits, r.longest_tokens, r.most_users) for r in made.rows} == {(None, None, None)}


def test_narrower_keys_and_values_reach_further() -> None:
    rows = [
        plan(weights="int8", work=Workload(users=4, tokens=8192, kv_dtype=kind)).rows[0]
        for kind in ("fp32", "bf16", "int8")
    ]
    assert rows[0].memory.kv_bytes == 2 * rows[1].memory.kv_bytes > 2 * rows[2].memory.kv_bytes
    users = [row.most_users for row in rows]
    assert users == sorted(users, key=lambda n: n or 0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"weights": "int5"}, "weights: got 'int5'. Did you mean 'int"),
        ({"weights": "int4", "group_size": 48}, "group_size: got 48; choose one of 32, 64 and"),
        ({"group_size": 64}, "group_size: says something only together with --weights"),
        ({"head_weights": "int8"}, "head_weights: says something only together with --weights"),
        ({"devices": 29}, "devices: got 29; a model of 28 layers fills 1 to 28"),
    ],
)
def test_choices_that_cannot_be(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(**how)


def test_more_tokens_than_any_extension_reaches() -> None:
    assert plan(work=Workload(tokens=131072)).rows
    with pytest.raises(UsageError, match=r"tokens: got 131073; .* reaches 131072 at most"):
        plan(work=Workload(tokens=131073))


# Counts of layers on each device, by (layers + 2) / devices: embedding and last norm are two.
@pytest.mark.parametrize(
    ("layers", "devices", "counts"),
    [
        (32, 1, [32]),
        (32, 2, [15, 17]),
        (32, 3, [10, 12, 10]),
        (32, 4, [7, 9, 9, 7]),
        (32, 8, [3, 5, 5, 5, 5, 5, 4, 0]),
        (40, 2, [19, 21]),
        (40, 4, [9, 11, 11, 9]),
        (40, 8, [4, 6, 6, 6, 6, 6, 6, 0]),
    ],
)
def test_layers_are_placed_as_the_first_script_did(
    layers: int, devices: int, counts: list[int]
) -> None:
    placed = layer_devices(layers, devices)
    assert list(placed) == sorted(placed)
    assert [placed.count(device) for device in range(devices)] == counts


@pytest.mark.parametrize("name", [SEVEN, "Qwen/Qwen2-0.5B", "Qwen/Qwen-7B-Chat"])
def test_shares_of_devices_are_the_whole(name: str) -> None:
    shape = find_shape(name, offline=True)
    weights = weigh(shape.architecture, shape.config, WeightPlan("int8"), shape.storage_of)
    work = Workload(users=2, tokens=4096)
    shares = stages(shape.config, weights, work, 3)
    whole = estimate(shape.config, weights, work, process_bytes=0)
    again = weights.pieces[0].held_bytes if shape.config.tie_word_embeddings else 0
    assert sum(stage.weight_bytes for stage in shares) == whole.weight_bytes + again
    assert abs(sum(stage.kv_bytes for stage in shares) - whole.kv_bytes) < 3
    assert shares[0].first_layer == 0
    assert shares[-1].end_layer == shape.config.num_hidden_layers
    assert [a.end_layer for a in shares[:-1]] == [b.first_layer for b in shares[1:]]
    assert shares[0].total_bytes == sum(
        (shares[0].weight_bytes, shares[0].kv_bytes, shares[0].activation_bytes)
    )


@pytest.mark.parametrize(
    ("name", "devices", "expected"),
    [
        ("Qwen/Qwen2-72B", 2, [("intermediate_size", 29568, 231, 29696)]),
        ("Qwen/Qwen-14B", 2, [("intermediate_size", 13696, 107, 13824)]),
        ("Qwen/Qwen2-7B", 2, []),
        (
            "Qwen/Qwen2-7B",
            3,
            [
                ("num_attention_heads", 28, 28, None),
                ("num_key_value_heads", 4, 4, None),
                ("intermediate_size", 18944, 148, 19200),
            ],
        ),
        ("Qwen/Qwen2-7B", 8, [("num_attention_heads", 28, 28, None),
                              ("intermediate_size", 18944, 148, 19456)]),
    ],
)  # fmt: skip
def test_widths_that_do_not_split_are_named_with_their_padding(
    name: str, devices: int, expected: list[tuple[str, int, int, int | None]]
) -> None:
    shape = find_shape(name, offline=True)
    plan = WeightPlan("int4", group_size=128)
    weights = weigh(shape.architecture, shape.config, plan, shape.storage_of)
    advice = split_advice(shape.config, weights, devices)
    assert [(a.name, a.width, a.units, a.padded) for a in advice] == expected


def test_a_folder_is_read_from_its_headers(tmp_path: Path) -> None:
    shape = find_shape(str(write_tiny_checkpoint(tmp_path / "model")))
    assert (shape.origin, shape.storage, shape.download_bytes) == ("files", "F32", 0)


def test_a_hub_is_asked_for_the_config_alone(hub: FakeHub) -> None:
    shape = find_shape("Some/Model")
    assert (shape.origin, shape.config.hidden_size) == ("hub", 32)
    assert shape.storage == "F32"
    assert shape.download_bytes == 5000 + len(hub.files["config.json"])
    assert [path.rpartition("/")[2] for path, _ in hub.requests] == ["main", "config.json"]


def test_a_repository_of_gguf_files_says_what_to_do(hub: FakeHub) -> None:
    hub.files = {"model-q4_0.gguf": b"GGUF"}
    with pytest.raises(ModelNotFoundError, match="has GGUF files only"):
        find_shape("Some/Model")


def test_published_names_need_no_hub() -> None:
    reached = find_shape(SEVEN)  # nothing listens there
    assert reached.origin == "table"
    assert reached.config.max_position_embeddings == 32768
    assert find_shape("Qwen/Qwen2-7B", offline=True).config.max_position_embeddings == 131072


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("Qwen-72B", 8192),
        ("Qwen2-57B-A14B", 131072),
        ("Qwen2.5-3B", 32768),
        ("Qwen2.5-7B", 131072),
        ("Qwen2.5-14B", 131072),
        ("Qwen2.5-32B", 131072),
        ("Qwen2.5-72B", 131072),
        ("Qwen2.5-72B-Instruct", 32768),
        ("Qwen3-4B", 40960),
        ("Qwen3-32B", 40960),
        ("Qwen3-30B-A3B", 40960),
        ("Qwen3-8B-Base", 32768),
    ],
)
def test_published_contexts(name: str, tokens: int) -> None:
    config = find_shape(f"Qwen/{name}", offline=True).config
    assert config.max_position_embeddings == tokens


def test_other_names_say_what_is_missing() -> None:
    with pytest.raises(ModelNotFoundError, match="not in the table of published Qwen models"):
        find_shape("Some/Model", offline=True)
    with pytest.raises(NetworkError, match="not in the table of published Qwen models"):
        find_shape("Some/Model")
    with pytest.raises(ModelNotFoundError, match="no hub name"):
        find_shape("qwen two", offline=True)


def test_models_of_other_hubs_must_be_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, **options: Any) -> Path:
        raise ModelNotFoundError(f"{name} is not whole in the cache")

    monkeypatch.setattr(plan_source, "resolve", absent)
    with pytest.raises(ModelNotFoundError, match="modelscope:qwen/Qwen-7B-Chat is not whole"):
        find_shape("modelscope:qwen/Qwen-7B-Chat")


def test_an_offline_setting_asks_no_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE is set"):
        find_shape("Some/Model")
    assert hub.requests == []


def test_weights_that_cannot_run_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    block = {"quantization_config": {"quant_method": "hqq", "bits": 4}}
    hub.files["config.json"] = json.dumps(CONFIG | block).encode()
    with pytest.raises(ConfigError, match="quant_method is 'hqq'"):
        find_shape("Some/Model")
    folder = write_tiny_checkpoint(tmp_path / "model", config=block)
    with pytest.raises(ConfigError, match="quant_method is 'hqq'"):
        find_shape(str(folder))


@pytest.mark.parametrize("name", LAYOUTS)
def test_quantized_files_are_weighed_as_they_are(name: str, hub: FakeHub, tmp_path: Path) -> None:
    """Of layers so small some scales are no small part: within a tenth."""
    written = write_quantized(tmp_path, LAYOUTS[name])
    shape = find_shape(str(written.folder))
    weights = weigh(shape.architecture, shape.config, WeightPlan(), shape.storage_of)
    loaded = load(written.folder, plan=WeightPlan()).model
    size = sum(b.nbytes for b in (*loaded.buffers(), *loaded.parameters()))
    assert weights.held_bytes == pytest.approx(size, rel=0.1)
    hub.files["config.json"] = (written.folder / "config.json").read_bytes()
    theirs = find_shape("Some/Model")
    assert theirs.storage == shape.storage
    again = weigh(theirs.architecture, theirs.config, WeightPlan(), theirs.storage_of)
    assert again.held_bytes == pytest.approx(size, rel=0.2)
    assert weights.rounds == (not name.endswith(("fp8", "blocks", "tensor")))


@pytest.mark.parametrize("kind", BITSANDBYTES_KINDS)
def test_kinds_of_bitsandbytes_are_weighed(kind: str, tmp_path: Path) -> None:
    written = write_quantized(tmp_path, LAYOUTS["nf4"])
    shape = find_shape(str(written.twin))
    plan = WeightPlan(kind)
    weights = weigh(shape.architecture, shape.config, plan, shape.storage_of)
    loaded = load(written.twin, plan=plan).model
    size = sum(b.nbytes for b in (*loaded.buffers(), *loaded.parameters()))
    assert weights.held_bytes == pytest.approx(size, rel=0.1)
    with_kind = make_plan(
        shape,
        Workload(tokens=512),
        Choice(weights=kind),
        process_bytes=0,
        available_bytes=1 << 40,
        machine_bytes=None,
    )
    assert with_kind.recommended == kind


def test_an_unknown_architecture_is_named(hub: FakeHub) -> None:
    hub.files["config.json"] = b'{"model_type": "mamba"}'
    with pytest.raises(ConfigError, match="Some/Model: model_type: got 'mamba'"):
        find_shape("Some/Model")


def test_a_tensor_of_its_own_storage_is_weighed_so() -> None:
    shape = find_shape(SEVEN, offline=True)
    mixed = Shape(
        shape.name, "files", shape.architecture, shape.config, "Q4_0", {"lm_head.weight": "Q6_K"}, 0
    )
    assert mixed.storage_of("lm_head.weight") == "Q6_K"
    assert mixed.storage_of("model.layers.0.mlp.up_proj.weight") == "Q4_0"
    weights = weigh(mixed.architecture, mixed.config, WeightPlan(), mixed.storage_of)
    head = next(piece for piece in weights.pieces if piece.path == "lm_head")
    assert head.held_bytes == head.stored_bytes == 152064 * 3584 // 256 * 210
