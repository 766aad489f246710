"""Padding for tensor parallelism: every width splits, and nothing that the model says changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from first_generation import write_first_generation
from qwenkit.bench.random_model import write_random_gguf
from qwenkit.checkpoint import open_checkpoint
from qwenkit.convert import export_folder
from qwenkit.errors import CheckpointError, UsageError
from qwenkit.formats.gptq import GptqWeight
from qwenkit.kernels.registry import reference_only
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import load
from qwenkit.padding import Width, pad_for_tensor_parallel
from tiny import CONFIG, tiny_tensors, write_tiny_checkpoint

EXPERTS = {
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "mlp_only_layers": [1],
}
IDS = torch.randint(0, 480, (40,), generator=torch.Generator().manual_seed(3))


def _logits(folder: Path) -> torch.Tensor:
    """By torch's reference kernels, in fp32."""
    model = load(folder, dtype="float32").model
    with torch.inference_mode(), reference_only():
        logits: torch.Tensor = model(IDS, PackedCausal([len(IDS)]))
    return logits


def _pad(source: Path, target: Path, ranks: int, group_size: int) -> Sequence[Width]:
    padded = export_folder(source, target, pad_for_tp=ranks, group_size=group_size).padded
    assert padded is not None
    return padded.widths


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_a_dense_model_says_the_same(model_type: str, tmp_path: Path) -> None:
    config = {"model_type": model_type, "head_dim": 8}
    source = write_tiny_checkpoint(tmp_path / "one", config=config)
    widths = _pad(source, tmp_path / "two", 4, 32)
    assert widths == (Width("intermediate_size", 48, 128),)
    assert json.loads((tmp_path / "two/config.json").read_text())["intermediate_size"] == 128
    tensors = open_checkpoint(tmp_path / "two").tensors
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (32, 128)
    assert tensors["model.layers.1.mlp.up_proj.weight"].shape == (128, 32)
    assert tensors["model.layers.1.self_attn.o_proj.weight"].shape == (32, 32)
    assert torch.equal(_logits(tmp_path / "two"), _logits(source))


def test_the_first_generation_counts_both_halves(tmp_path: Path) -> None:
    source = write_first_generation(tmp_path / "one")
    assert _pad(source, tmp_path / "two", 2, 32) == (Width("intermediate_size", 48, 64),)
    assert json.loads((tmp_path / "two/config.json").read_text())["intermediate_size"] == 128
    assert torch.equal(_logits(tmp_path / "two"), _logits(source))


def test_biases_get_zeros_too(tmp_path: Path) -> None:
    source = write_first_generation(tmp_path / "one", config={"no_bias": False})
    _pad(source, tmp_path / "two", 2, 32)
    tensors = open_checkpoint(tmp_path / "two").tensors
    assert tensors["transformer.h.0.mlp.w1.bias"].shape == (64,)
    assert tensors["transformer.h.0.mlp.c_proj.bias"].shape == (32,)
    assert torch.equal(_logits(tmp_path / "two"), _logits(source))


@pytest.mark.parametrize("fused", [False, True])
def test_every_width_of_a_mixture_is_padded(fused: bool, tmp_path: Path) -> None:
    tensors = tiny_tensors(CONFIG | EXPERTS)
    if fused:
        tensors = _fused(tensors)
    source = write_tiny_checkpoint(tmp_path / "one", config=EXPERTS, tensors=tensors)
    widths = _pad(source, tmp_path / "two", 2, 16)
    assert widths == (
        Width("intermediate_size", 48, 64),
        Width("shared_expert_intermediate_size", 40, 64),
        Width("moe_intermediate_size", 24, 32),
    )
    assert torch.equal(_logits(tmp_path / "two"), _logits(source))


def _fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts stacked, gate above up, as transformers 5 writes them."""
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    path = "model.layers.0.mlp.experts"

    def stack(name: str) -> torch.Tensor:
        return torch.stack([tensors[f"{path}.{e}.{name}.weight"] for e in range(4)])

    kept[f"{path}.gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], 1)
    kept[f"{path}.down_proj"] = stack("down_proj")
    return kept


def _gptq(folder: Path, *, bits: int, group_size: int, act_order: bool, v2: bool = False) -> Path:
    """Random integers in a GPTQ layout of the feed-forward parts."""
    generator = torch.Generator().manual_seed(bits)
    tensors = tiny_tensors(CONFIG)
    for name in [n for n in tensors if ".mlp." in n]:
        rows, columns = tensors.pop(name).shape
        size = columns if group_size == -1 else group_size
        groups = -(-columns // size)
        index = torch.arange(columns) // size
        if act_order:
            index = index[torch.randperm(columns, generator=generator)]
        top = 1 << bits
        weight = GptqWeight.from_integers(
            torch.randint(top, (rows, columns), dtype=torch.uint8, generator=generator),
            torch.rand(rows, groups, generator=generator) * 0.1,
            torch.randint(1, top, (rows, groups), dtype=torch.uint8, generator=generator),
            index,
            bits=bits,
            is_v2=v2,
        )
        path = name.removesuffix(".weight")
        tensors |= {f"{path}.{part}": tensor for part, tensor in weight.to_tensors().items()}
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": group_size}
    quantization |= {"desc_act": act_order, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    config = {"quantization_config": quantization}
    return write_tiny_checkpoint(folder, config=config, tensors=tensors)


@pytest.mark.parametrize(
    ("bits", "group_size", "act_order", "v2"),
    [
        (4, 16, False, False),
        (4, 16, True, False),
        (8, 16, False, True),
        (3, 16, False, False),
        (2, 8, True, True),
        (4, -1, False, False),
        (4, 32, False, False),  # the last group has only half of its columns
    ],
)
def test_gptq_weights_say_the_same(
    bits: int, group_size: int, act_order: bool, v2: bool, tmp_path: Path
) -> None:
    source = _gptq(tmp_path / "one", bits=bits, group_size=group_size, act_order=act_order, v2=v2)
    ranks = 1 if group_size == -1 else 4
    given = 64 if group_size == -1 else None  # by default that of the file
    after = {8: 64, 16: 64, 32: 128, -1: 128}[group_size]
    done = export_folder(source, tmp_path / "two", pad_for_tp=max(ranks, 2), group_size=given)
    assert done.padded is not None
    assert done.padded.widths == (Width("intermediate_size", 48, after),)
    tensors = open_checkpoint(tmp_path / "two").tensors
    down = {n: tensors[f"model.layers.0.mlp.down_proj.{n}"] for n in ("scales", "g_idx")}
    groups = 1 if group_size == -1 else after // group_size
    assert down["scales"].shape == (groups, 32)
    index = down["g_idx"].read()
    assert int(index.max()) == groups - 1
    if not act_order:  # engines then take a column's group from its place
        expected = torch.arange(after) // (after if group_size == -1 else group_size)
        assert torch.equal(index.long(), expected)
    assert torch.equal(_logits(tmp_path / "two"), _logits(source))


def test_what_divides_already_is_left_alone(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "one")
    padded = pad_for_tensor_parallel(open_checkpoint(source), 3, group_size=16)
    assert padded.widths == ()
    assert padded.checkpoint.config["intermediate_size"] == 48


def test_a_key_that_no_matrix_has_stays(tmp_path: Path) -> None:
    """As `intermediate_size` of Qwen2-57B-A14B, whose layers are all mixtures."""
    config = EXPERTS | {"mlp_only_layers": []}
    source = write_tiny_checkpoint(tmp_path / "one", config=config)
    padded = pad_for_tensor_parallel(open_checkpoint(source), 2, group_size=16)
    assert [w.key for w in padded.widths] == [
        "shared_expert_intermediate_size",
        "moe_intermediate_size",
    ]
    assert padded.checkpoint.config["intermediate_size"] == 48


def test_published_widths(tmp_path: Path) -> None:
    """The two that people asked about: 231 and 107 groups of 128."""
    for width, ranks, after in ((29568, 8, 29696), (13696, 2, 13824), (18944, 4, 18944)):
        assert -(-width // (ranks * 128)) * ranks * 128 == after
        config = {"intermediate_size": width, "hidden_size": 2, "num_hidden_layers": 1}
        config |= {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 464}
        source = write_tiny_checkpoint(tmp_path / str(width), config=config)
        padded = pad_for_tensor_parallel(open_checkpoint(source), ranks)
        assert padded.checkpoint.config["intermediate_size"] == after


def test_what_no_padding_helps_is_said(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "one")  # 4 heads, 2 of keys and values
    remarks = pad_for_tensor_parallel(open_checkpoint(source), 8, group_size=16).remarks
    assert remarks == (
        "num_attention_heads is 4, which 8 does not divide; no padding helps. It splits over "
        "1, 2, 4.",
        "num_key_value_heads is 2, which 8 does not divide; most engines give each device a copy. "
        "It splits over 1, 2.",
    )
    assert pad_for_tensor_parallel(open_checkpoint(source), 2, group_size=16).remarks == ()


def test_what_cannot_be_padded_is_refused(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "one")
    checkpoint = open_checkpoint(source)
    for ranks in (0, -1, 5000, 2.0, True):
        with pytest.raises(UsageError, match="pad_for_tp: got"):
            pad_for_tensor_parallel(checkpoint, ranks)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="group_size: got 0"):
        pad_for_tensor_parallel(checkpoint, 2, group_size=0)
    config = CONFIG | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300}
    write_random_gguf(tmp_path / "m.gguf", config)
    for call in (
        lambda: export_folder(tmp_path / "m.gguf", tmp_path / "x", pad_for_tp=2),
        lambda: pad_for_tensor_parallel(open_checkpoint(tmp_path / "m.gguf"), 2),
    ):
        with pytest.raises(UsageError, match="a GGUF is not padded"):
            call()
    gptq = _gptq(tmp_path / "gptq", bits=4, group_size=16, act_order=False)
    with pytest.raises(UsageError, match="got 24; the checkpoint has groups of 16"):
        pad_for_tensor_parallel(open_checkpoint(gptq), 2, group_size=24)
    settings: dict[str, Any] = json.loads((gptq / "config.json").read_text())
    settings["quantization_config"]["quant_method"] = "awq"
    (gptq / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match=r"mlp\.gate_proj: \w+ weights cannot be padded"):
        pad_for_tensor_parallel(open_checkpoint(gptq), 4)
    settings = {"intermediate_size": 40}
    wrong = write_tiny_checkpoint(tmp_path / "two", config=settings, tensors=tiny_tensors(CONFIG))
    with pytest.raises(CheckpointError, match="does not fit intermediate_size, 40"):
        pad_for_tensor_parallel(open_checkpoint(wrong), 2, group_size=16)


def test_a_folder_is_exported_as_it_is(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "one")
    told: list[float] = []
    done = export_folder(source, tmp_path / "two", shard_bytes=30_000, progress=told.append)
    assert len(done.weights) > 1
    assert done.padded is None
    assert told[-1] == 1.0
    one, two = (open_checkpoint(tmp_path / name) for name in ("one", "two"))
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(t.read(), two.tensors[n].read()) for n, t in one.tensors.items())
    assert one.config == two.config
    assert one.chat_template == two.chat_template
