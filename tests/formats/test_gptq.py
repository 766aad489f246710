"""GPTQ's layout: vectors made number by number from its definition, and what files get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit.errors import CheckpointError, ConfigError, UsageError
from qwenkit.formats.gptq import FORMAT, GptqWeight
from qwenkit.formats.spec import claim
from qwenkit.layers.attention import PackedCausal
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.weight import QuantWeight
from qwenkit.load import load
from qwenkit.models.published import published_tensors
from qwenkit.save import save_folder
from tiny import CONFIG, tiny_tensors, write_tiny_checkpoint

ROWS, COLUMNS = 32, 64
STORAGE = {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"}


def _made(bits: int, *, is_v2: bool, act_order: bool, groups: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(bits)
    numbers = torch.randint(0, 1 << bits, (ROWS, COLUMNS), generator=generator)
    zeros = torch.randint(0, 1 << bits, (ROWS, groups), generator=generator)
    scales = (torch.rand(ROWS, groups, generator=generator) + 0.5).half()
    g_idx = torch.arange(COLUMNS) // (COLUMNS // groups)
    if act_order:
        g_idx = g_idx[torch.randperm(COLUMNS, generator=generator)]
    return {"numbers": numbers, "zeros": zeros, "scales": scales, "g_idx": g_idx}


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _word(run: int, index: int) -> int:
    return _signed(run >> (32 * index) & 0xFFFFFFFF)


def _as_in_a_file(made: dict[str, Any], bits: int, *, is_v2: bool) -> dict[str, torch.Tensor]:
    """Tensors made a number at a time: columns run down `qweight`, rows along `qzeros`."""
    numbers, zeros = made["numbers"].tolist(), made["zeros"].tolist()
    qweight = torch.zeros(COLUMNS * bits // 32, ROWS, dtype=torch.int32)
    for row in range(ROWS):
        run = sum(n << (bits * column) for column, n in enumerate(numbers[row]))
        for word in range(qweight.shape[0]):
            qweight[word, row] = _word(run, word)
    groups = made["scales"].shape[1]
    qzeros = torch.zeros(groups, ROWS * bits // 32, dtype=torch.int32)
    for group in range(groups):
        stored = [zeros[row][group] - (0 if is_v2 else 1) for row in range(ROWS)]
        run = sum(z % (1 << bits) << (bits * row) for row, z in enumerate(stored))
        for word in range(qzeros.shape[1]):
            qzeros[group, word] = _word(run, word)
    return {
        "qweight": qweight,
        "qzeros": qzeros,
        "scales": made["scales"].T.contiguous(),
        "g_idx": made["g_idx"].to(torch.int32),
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_file_is_read_and_written(bits: int, is_v2: bool, act_order: bool) -> None:
    made = _made(bits, is_v2=is_v2, act_order=act_order)
    tensors = _as_in_a_file(made, bits, is_v2=is_v2)
    tag = f"GPTQ{bits}" + ("_V2" if is_v2 else "")
    weight = GptqWeight.from_tensors(tensors, shape=(ROWS, COLUMNS), storage=tag)
    assert weight.storage == tag
    assert torch.equal(weight.numbers().long(), made["numbers"])
    assert torch.equal(weight.zero_points().long(), made["zeros"])
    scales, g_idx = made["scales"].float(), made["g_idx"]
    expected = (made["numbers"] - made["zeros"][:, g_idx]) * scales[:, g_idx]
    assert torch.equal(weight.dequantize(torch.float32), expected)
    packed = GptqWeight.from_integers(
        made["numbers"].to(torch.uint8),
        scales,
        made["zeros"].to(torch.uint8),
        g_idx,
        bits=bits,
        is_v2=is_v2,
    )
    for name, tensor in packed.to_tensors().items():
        assert torch.equal(tensor, tensors[name]), name


def test_a_file_of_symmetric_four_bits_has_the_well_known_words() -> None:
    numbers = torch.full((8, 8), 8, dtype=torch.uint8)
    zeros = torch.full((8, 1), 8, dtype=torch.uint8)
    groups = torch.zeros(8, dtype=torch.int64)
    weight = GptqWeight.from_integers(numbers, torch.ones(8, 1), zeros, groups, bits=4)
    assert weight.qzeros.tolist() == [[0x77777777]]
    assert weight.qweight.tolist() == [[_signed(0x88888888)] * 8]
    second = GptqWeight.from_integers(numbers, torch.ones(8, 1), zeros, groups, bits=4, is_v2=True)
    assert second.qzeros.tolist() == [[_signed(0x88888888)]]
    assert not weight.dequantize(torch.float32).any()


def test_groups_in_order_need_no_index() -> None:
    tensors = _as_in_a_file(_made(4, is_v2=False, act_order=False), 4, is_v2=False)
    whole = GptqWeight.from_tensors(tensors, shape=(ROWS, COLUMNS), storage="GPTQ4")
    del tensors["g_idx"]
    weight = GptqWeight.from_tensors(tensors, shape=(ROWS, COLUMNS), storage="GPTQ")
    assert weight.to_tensors().keys() == tensors.keys()
    assert torch.equal(weight.dequantize(torch.float32), whole.dequantize(torch.float32))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qweight", lambda t: t[:-1], r"qweight: got torch.int32 \[7, 32\]; of 32 × 64 numbers"),
        ("qzeros", lambda t: t[:-1], "qzeros: got"),
        ("scales", lambda t: t.to(torch.int32), "scales: got torch.int32"),
        ("g_idx", lambda t: t + 1, "g_idx: names a group beyond its 4"),
        ("g_idx", lambda t: t[1:], "g_idx: got"),
    ],
)
def test_what_does_not_fit_is_named(name: str, change: Any, message: str) -> None:
    tensors = _as_in_a_file(_made(4, is_v2=False, act_order=False), 4, is_v2=False)
    tensors[name] = change(tensors[name])
    with pytest.raises(CheckpointError, match=message):
        GptqWeight.from_tensors(tensors, shape=(ROWS, COLUMNS), storage="GPTQ4")


def test_integers_that_do_not_fit_are_refused() -> None:
    numbers, zeros = torch.full((4, 8), 8, dtype=torch.uint8), torch.ones(4, 1, dtype=torch.uint8)
    groups = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(UsageError, match="do not fit 3 bits"):
        GptqWeight.from_integers(numbers, torch.ones(4, 1), zeros, groups, bits=3)
    with pytest.raises(UsageError, match="bits: got 5"):
        GptqWeight.from_integers(numbers, torch.ones(4, 1), zeros, groups, bits=5)


def test_the_config_says_what_it_is() -> None:
    config = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}
    assert claim(STORAGE, config) is FORMAT
    assert FORMAT.tag(STORAGE, config) == "GPTQ4_V2"
    assert FORMAT.tag(STORAGE, {"bits": 3}) == "GPTQ3"
    assert FORMAT.tag(STORAGE, {"bits": 4, "dynamic": {"+:.*down": {"bits": 8}}}) == "GPTQ"
    assert claim(STORAGE, {}) is None
    for wrong in ({"bits": 5}, {"bits": None}, {"bits": 4, "checkpoint_format": "marlin"}):
        with pytest.raises(CheckpointError, match="quantization_config"):
            FORMAT.tag(STORAGE, wrong)


def _rounded(tensor: torch.Tensor, bits: int = 4) -> GptqWeight:
    """Symmetric, one group a row."""
    middle = 1 << (bits - 1)
    scales = tensor.abs().amax(1, keepdim=True) / (middle - 1)
    numbers = (tensor / scales).round().add(middle).to(torch.uint8)
    zeros = torch.full((len(tensor), 1), middle, dtype=torch.uint8)
    groups = torch.zeros(tensor.shape[1], dtype=torch.int64)
    return GptqWeight.from_integers(numbers, scales, zeros, groups, bits=bits)


MOE: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def _write(folder: Path, config: dict[str, Any], *, bias_of_zeros: bool = False) -> Path:
    """A tiny model with every projection quantized, experts one by one as they are published."""
    full = CONFIG | config
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in tiny_tensors(full).items():
        path, _, part = name.rpartition(".")
        if part == "weight" and path.endswith("_proj"):
            for own, made in _rounded(tensor).to_tensors().items():
                tensors[f"{path}.{own}"] = made
            if bias_of_zeros and f"{path}.bias" not in tiny_tensors(full):
                tensors[f"{path}.bias"] = torch.zeros(len(tensor), dtype=torch.float16)
        else:
            tensors[name] = tensor
    method = {"quant_method": "gptq", "bits": 4, "group_size": -1}
    return write_tiny_checkpoint(
        folder, config=config | {"quantization_config": method}, tensors=tensors
    )


def _logits(folder: Path) -> torch.Tensor:
    model = load(folder).model
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.arange(12), PackedCausal([12]))
    return logits


@pytest.mark.parametrize("config", [{}, MOE], ids=["dense", "experts"])
def test_a_model_runs_as_its_dequantized_twin(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = _write(tmp_path / "gptq", config, bias_of_zeros=True)
    loaded = load(folder)
    quantized = [m for m in loaded.model.modules() if isinstance(m, QuantWeight)]
    assert quantized
    twin = {
        name: _rounded(tensor).dequantize(torch.float32) if "_proj.weight" in name else tensor
        for name, tensor in tiny_tensors(CONFIG | config).items()
    }
    plain = write_tiny_checkpoint(tmp_path / "twin", config=config, tensors=twin)
    ours, theirs = _logits(folder), _logits(plain)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    experts = [m for m in loaded.model.modules() if isinstance(m, GroupedLinear)]
    assert bool(experts) == (config is MOE)
    for module in experts:
        assert isinstance(module.group_weight(1), GptqWeight)


@pytest.mark.parametrize("config", [{}, MOE], ids=["dense", "experts"])
def test_what_was_loaded_is_written_again(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = _write(tmp_path / "gptq", config)
    save_folder(load(folder), tmp_path / "again")
    first, second = (
        {t.name: t.tensor for t in published_tensors(load(f).model)}
        for f in (folder, tmp_path / "again")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_bias_that_says_something_is_not_dropped(tmp_path: Path) -> None:
    folder = _write(tmp_path, {})
    tensors = {t.name: t.tensor for t in published_tensors(load(folder).model)}
    tensors["model.layers.1.mlp.down_proj.bias"] = torch.ones(32)
    config = json.loads((folder / "config.json").read_text())
    write_tiny_checkpoint(folder, config=config, tensors=tensors)
    with pytest.raises(
        CheckpointError, match=r"belong to no part .*layers\.1\.mlp\.down_proj\.bia"
    ):
        load(folder)


def test_an_unknown_method_is_named(tmp_path: Path) -> None:
    folder = _write(tmp_path, {})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "aqlm"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quant_method is 'aqlm'"):
        load(folder)
