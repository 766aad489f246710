"""Models on devices that this machine does not have, through every door."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_devices import fake, fake_machine, on_fake_devices
from qwenkit import LLM, AutoModelForCausalLM, AutoTokenizer, load_model_on_gpus
from qwenkit.errors import CheckpointError, UsageError
from qwenkit.load import load
from qwenkit.parallel import DeviceMap, plan_devices
from tiny import write_tiny_checkpoint

GREEDY = {"max_tokens": 12, "temperature": 0}
PROMPTS = ["Once upon a time", "One two three four"]
SPLIT: dict[str, Any] = {
    "model.embed_tokens": 0,
    "model.layers": "cpu",
    "model.layers.0": 0,
    "model.layers.2": torch.device(fake(1)),
    "model.norm": 2,
    "lm_head": fake(1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("split"), config={"num_hidden_layers": 4})


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[tuple[int, ...]]:
    """What the processor alone answers."""
    with LLM(folder, compute="reference") as llm:
        return tokens(llm)


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with three accelerators."""
    fake_machine(monkeypatch, 1 << 30, 1 << 30, 1 << 30)
    with on_fake_devices():
        yield


def tokens(llm: LLM) -> list[tuple[int, ...]]:
    done = llm.generate(PROMPTS, GREEDY)
    assert [completion.error for completion in done] == [None, None]
    return [completion.token_ids for completion in done]


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("how", [{"device": fake(1)}, {"device": "auto"}, {"device_map": "auto"}])
def test_a_whole_model_elsewhere_says_the_same(
    folder: Path, expected: list[tuple[int, ...]], how: dict[str, str]
) -> None:
    with LLM(folder, **how) as llm:
        assert llm.devices == (fake(1) if "1" in str(how) else fake(0))
        assert {p.device for p in llm.model.parameters()} == {llm.device}
        assert tokens(llm) == expected


@pytest.mark.usefixtures("three")
def test_parts_and_caches_are_where_the_map_says(
    folder: Path, expected: list[tuple[int, ...]]
) -> None:
    with LLM(folder, device_map=SPLIT) as llm:
        assert isinstance(llm.devices, DeviceMap)
        places = [fake(0), "cpu", fake(1), "cpu"]
        assert list(llm.devices.layer_devices) == places
        for number, place in enumerate(places):
            block = llm.model.get_submodule(f"model.layers.{number}")
            assert {str(p.device) for p in block.parameters()} == {place}
        cache = llm._service._worker.engine._runner._cache
        assert [str(keys.device) for keys in cache.keys] == places
        assert [str(values.device) for values in cache.values] == places
        assert tokens(llm) == expected
        assert tokens(llm) == expected, "nothing of the first run is left in the second"


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_rounded_weights_compute_elsewhere(folder: Path, weights: str) -> None:
    with LLM(folder, weights=weights, compute="reference") as here:
        answer = tokens(here)
    with LLM(folder, weights=weights, device_map=SPLIT, compute="reference") as there:
        assert tokens(there) == answer


def test_a_model_of_any_dtype_is_split(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_machine(monkeypatch, 1 << 30, 1 << 30, bf16=True)
    with on_fake_devices(), LLM(folder, device_map={"": 0, "lm_head": 1}) as llm:
        assert llm.model.dtype == torch.bfloat16
        assert len(tokens(llm)[0]) > 0


def test_auto_fills_one_device_after_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch, expected: list[tuple[int, ...]]
) -> None:
    block = sum(t.size_bytes for n, t in load(folder).checkpoint.tensors.items() if ".2." in n)
    cache = 2 * 2 * 8 * 4 * 512  # keys and values, kv_heads, head_dim, bytes, tokens of context
    embedding = 480 * 32 * 4
    room = (embedding + 2 * (block + cache)) / 0.9
    fake_machine(monkeypatch, int(room) + 4, int(room) + 4)
    placed = plan_devices(folder, "auto")
    assert isinstance(placed, DeviceMap)
    assert placed.layer_devices == (fake(0), fake(0), fake(1), fake(1))
    with on_fake_devices(), LLM(folder, device_map="auto") as llm:
        assert llm.devices == placed
        assert tokens(llm) == expected
    fewer = plan_devices(folder, "auto", kv_cache_tokens=16)
    assert fewer == plan_devices(folder, "auto", dtype="float32", kv_cache_tokens=16)
    assert isinstance(fewer, DeviceMap)
    assert fewer.layer_devices.count(fake(0)) > 2, "less for the cache leaves more for layers"


@pytest.mark.usefixtures("three")
def test_the_published_script_for_several_cards(
    folder: Path, expected: list[tuple[int, ...]]
) -> None:
    model = load_model_on_gpus(folder, num_gpus=2)
    assert model.llm.devices.layer_devices == (fake(0), fake(0), fake(1), fake(1))
    assert model.llm.devices.devices["model.norm"] == fake(0)
    assert model.llm.devices.devices["lm_head"] == fake(1)
    assert tokens(model.llm) == expected
    assert load_model_on_gpus(folder, num_gpus=1).llm.devices == fake(0)
    for asked, said in ((4, r"torch finds 3 here \(maia:0, maia:1, maia:2\)"), (0, "at least 1")):
        with pytest.raises(UsageError, match=f"^num_gpus: .*{said}"):
            load_model_on_gpus(folder, num_gpus=asked)


@pytest.mark.usefixtures("three")
def test_calls_of_the_published_snippets_work_on_a_split_model(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(["abcdef", "xyz"], padding=True, return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    split = AutoModelForCausalLM.from_pretrained(folder, device_map=SPLIT).eval()
    assert split.device == torch.device(fake(0))
    one, two = plain(**ids).logits, split(**ids).logits
    torch.testing.assert_close(two.cpu(), one, rtol=0, atol=1e-5 * one.abs().max().item())
    options = {"max_new_tokens": 8, "do_sample": False}
    moved = tokenizer("abcdef", return_tensors="pt").to(split.device)
    there = split.generate(moved.input_ids, **options)
    assert torch.equal(there.cpu(), plain.generate(moved.input_ids.cpu(), **options))


@pytest.mark.usefixtures("three")
def test_half_precision_of_the_published_snippets(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_machine(monkeypatch, 1 << 30, fp16=True)
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", fp16=True)
        assert (model.dtype, caplog.records) == (torch.float16, [])
        model = AutoModelForCausalLM.from_pretrained(folder, fp16=True)
        assert model.dtype == torch.float32
    assert "float16 was asked for" in caplog.text


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"device": "cuda:9"}, "^device: 'cuda:9' is not there.*cpu"),
        ({"device": "nonsense"}, "^device: 'nonsense' is not there"),
        ({"device": "cpu", "device_map": 0}, "^device_map: there is no accelerator 0; torch find"),
        ({"device": "auto", "device_map": "cpu"}, "^device: 'auto' was given beside a device_map"),
        ({"device_map": {"": True}}, "^device_map: expected a device or its number, got True"),
        ({"device_map": {"": "disk"}}, "^device: 'disk' is not there"),
        ({"device_map": {"model": "cpu"}}, "^device_map: says nothing of 'lm_head'"),
    ],
)
def test_places_that_cannot_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], said: str
) -> None:
    fake_machine(monkeypatch)
    with pytest.raises(UsageError, match=said):
        LLM(folder, **how)


def test_a_damaged_number_of_layers_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_machine(monkeypatch, 1 << 30, 1 << 30)
    folder = write_tiny_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9000}))
    for how in ({"device_map": "auto"}, {"device_map": {"": 0}}):
        with pytest.raises(CheckpointError, match="num_hidden_layers: got 9000,"):
            LLM(folder, **how)


def test_a_machine_without_accelerators_uses_its_processor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_machine(monkeypatch)
    assert plan_devices(folder, "auto") == "cpu"
    with LLM(folder, device_map={"model": "cpu", "lm_head": "cpu:0"}) as llm:
        assert llm.devices == "cpu"
