"""A result beside its parent: what is planted is found, in the right matrix, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantized_made import DENSE, EXPERTS, compared, made_rows, write_quantized
from qwenkit.checkpoint import open_checkpoint, write_safetensors
from qwenkit.errors import CheckpointError, QualityError, UsageError
from qwenkit.formats.gptq import GptqWeight
from qwenkit.quantize.compare import Comparison, MatrixComparison
from qwenkit.quantize.judge import judge, measure, publish
from qwenkit.quantize.report import Limits, Sheet, method_notes, shortened
from qwenkit.quantize.run import quantize
from qwenkit.quantize.settings import QuantizeSettings
from qwenkit.quantize.stream import LayerSource
from tiny import tiny_tensors, write_tiny_checkpoint

LOOSE = Limits(perplexity_rise=1e6, kl=1e6)
LAYER = "model.layers.1."
Tensors = dict[str, torch.Tensor]


def _tensors(folder: Path) -> Tensors:
    return {n: t.read().clone() for n, t in open_checkpoint(folder).tensors.items()}


def _a_bad_scale(tensors: Tensors) -> set[str]:
    tensors[f"{LAYER}mlp.up_proj.scales"][1, 7] *= 8  # one group of one row
    return {"mlp.up_proj"}


def _gate_and_up_swapped(tensors: Tensors) -> set[str]:
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        gate, up = (f"{LAYER}mlp.{name}_proj.{part}" for name in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]
    return {"mlp.gate_proj", "mlp.up_proj"}


def _zero_points_of_the_other_version(tensors: Tensors) -> set[str]:
    tensors[f"{LAYER}self_attn.v_proj.qzeros"] += 0x11111111
    return {"self_attn.v_proj"}


def _packed_across(tensors: Tensors) -> set[str]:
    path = f"{LAYER}self_attn.o_proj"
    own = {n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(path)}
    weight = GptqWeight.from_tensors(own, shape=(64, 64), storage="GPTQ4")
    scales = weight.scales.T.float()
    numbers, zeros = weight.numbers().T.contiguous(), weight.zero_points()
    made = GptqWeight.from_integers(numbers, scales, zeros, weight.groups, bits=4)
    tensors[f"{path}.qweight"] = made.qweight
    return {"self_attn.o_proj"}


def _say_nothing_of_symmetry(path: Path) -> None:
    """Of symmetric numbers the loader itself knows what zero points must be, and refuses others."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]["sym"]
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "plant",
    [
        _a_bad_scale,
        _gate_and_up_swapped,
        _zero_points_of_the_other_version,
        _packed_across,
    ],
)
@pytest.mark.parametrize("judged_by", ["text", "few tokens", "random tokens"])
def test_what_is_planted_is_named(
    tmp_path: Path, plant: Callable[[Tensors], set[str]], judged_by: str
) -> None:
    source, path, rows = write_quantized(
        tmp_path, QuantizeSettings(bits=4, group_size=32), config=DENSE
    )
    few = (rows.judging[0][:6],)
    judging = {"text": rows.judging, "few tokens": few, "random tokens": ()}[judged_by]
    with torch.inference_mode():
        clean = measure(source, path, judging, "", limits=LOOSE, name="clean")
        assert clean.refusals() == []
        tensors = _tensors(path)
        expected = {f"{LAYER}{name}" for name in plant(tensors)}
        write_safetensors(path / "model.safetensors", tensors)
        _say_nothing_of_symmetry(path)
        sheet = measure(source, path, judging, "", limits=LOOSE, name="planted")
    assert {matrix.path for matrix, _ in sheet.suspects()} == expected
    assert len(sheet.refusals()) == len(expected)


def test_a_whole_file_of_the_other_version_is_named(tmp_path: Path) -> None:
    source, path, rows = write_quantized(tmp_path, QuantizeSettings(bits=4, group_size=32))
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    file.write_text(json.dumps(config))
    with (
        torch.inference_mode(),
        pytest.raises(CheckpointError, match=r"layers\.0\..*zero points are all 7"),
    ):
        measure(source, path, rows.judging, "", limits=LOOSE, name="v2")
    _say_nothing_of_symmetry(path)
    with torch.inference_mode():
        sheet = measure(source, path, rows.judging, "", limits=LOOSE, name="v2")
    assert len(sheet.suspects()) >= 12  # of fourteen matrices


def test_scales_that_were_folded_are_nobodys_fault(tmp_path: Path) -> None:
    """AWQ moves factors between matrices; each is measured without them."""
    for config in (DENSE, EXPERTS):
        folder = tmp_path / str(config.get("model_type"))
        settings = QuantizeSettings(method="awq", group_size=32)
        source, path, rows = write_quantized(folder, settings, config=config)
        with torch.inference_mode():
            sheet = measure(source, path, rows.judging, "", limits=LOOSE, name="awq")
        assert sheet.refusals() == []
        assert max(m.beside_rounding or 0 for m in sheet.comparison.matrices) < 1.3


def test_a_model_is_its_own_equal(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "parent", config=EXPERTS)
    source = LayerSource(path)
    found = compared(source, path, made_rows(source, tmp_path))
    assert found.kl == pytest.approx(0.0, abs=1e-9)
    assert found.top1 == 1.0
    assert found.parent_perplexity == found.own_perplexity
    assert {m.error for m in found.matrices} == {0.0}
    assert {m.storage for m in found.matrices} == {None}
    assert found.drifts == [0.0, 0.0]
    assert found.bits_per_weight is None


def test_plain_matrices_that_are_wrong_are_named(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "parent", config=DENSE)
    full = json.loads((path / "config.json").read_text())
    tensors = tiny_tensors(full)
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    other = write_tiny_checkpoint(tmp_path / "other", config=DENSE, tensors=tensors)
    with torch.inference_mode():
        sheet = measure(LayerSource(path), other, (), "", limits=LOOSE, name="other")
    assert {m.path for m, _ in sheet.suspects()} == {
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    }


@pytest.mark.parametrize("path", ["model.norm", "lm_head", "model.embed_tokens"])
def test_ends_that_are_wrong_are_named_without_a_text(tmp_path: Path, path: str) -> None:
    config = {**DENSE, "tie_word_embeddings": False}
    parent = write_tiny_checkpoint(tmp_path / "parent", config=config)
    tensors = tiny_tensors(json.loads((parent / "config.json").read_text()))
    tensors["model.norm.weight"] = torch.linspace(0.5, 2, len(tensors["model.norm.weight"]))
    parent = write_tiny_checkpoint(tmp_path / "own", config=config, tensors=tensors)
    with torch.inference_mode():
        alike = measure(LayerSource(parent), parent, (), "", limits=LOOSE, name="own")
    assert alike.suspects() == []
    tensors[f"{path}.weight"] = tensors[f"{path}.weight"].roll(7, 0)
    other = write_tiny_checkpoint(tmp_path / "other", config=config, tensors=tensors)
    with torch.inference_mode():
        sheet = measure(LayerSource(parent), other, (), "", limits=LOOSE, name="other")
    assert {m.path for m, _ in sheet.suspects()} == {path}


def test_layers_that_overflow_fp16_are_named(tmp_path: Path) -> None:
    config = DENSE | {"torch_dtype": "float32"}
    full = write_tiny_checkpoint(tmp_path / "a", config=config)
    tensors = _tensors(full)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e5
    path = write_tiny_checkpoint(tmp_path / "parent", config=config, tensors=tensors)
    with torch.inference_mode():
        sheet = measure(LayerSource(path), path, (), "", limits=LOOSE, name="same")
    paths = [name for name, _ in sheet.overflowing()]
    assert paths == ["model.layers.1.mlp.down_proj", "model.layers.1.mlp"]
    assert "Beyond the numbers of fp16" in sheet.to_markdown()
    assert sheet.to_json()["overflowing_fp16"][0][0] == paths[0]


def test_models_of_other_shapes_are_not_compared(tmp_path: Path) -> None:
    first = LayerSource(write_tiny_checkpoint(tmp_path / "a", config=DENSE))
    for changed, message in (
        ({"num_hidden_layers": 3}, "num_hidden_layers: 2 in .*, 3 in "),
        ({"model_type": "qwen", "intermediate_size": 192}, "model_type: qwen2 and qwen"),
    ):
        other = write_tiny_checkpoint(tmp_path / str(len(message)), config=DENSE | changed)
        with pytest.raises(UsageError, match=message):
            measure(first, other, (), "", limits=LOOSE, name="b")


def test_what_is_beyond_the_limits_is_refused_unless_forced(tmp_path: Path) -> None:
    source = LayerSource(write_tiny_checkpoint(tmp_path / "parent", config=DENSE))
    rows, settings = made_rows(source, tmp_path), QuantizeSettings(bits=2, group_size=64)
    with torch.inference_mode():
        work, results = quantize(source, rows, settings, tmp_path / "result")
        sheet = judge(work, results, source, rows, settings, limits=Limits())
    with pytest.raises(QualityError, match=r"refused, for .*KL to the parent is .*--force"):
        publish(work, sheet)
    assert not (tmp_path / "result").exists()
    refused = json.loads((work.path / "quality.json").read_text())
    assert refused["refusals"]
    assert refused["settings"]["bits"] == 2
    assert refused["calibration"] == {"rows": 21, "tokens": rows.tokens}
    publish(work, sheet, force=True)
    written = json.loads((tmp_path / "result" / "quality.json").read_text())
    assert written["kl"] == refused["kl"]
    assert "written by --force" in (tmp_path / "result" / "quality.md").read_text()
    assert not work.path.exists()


def _comparison() -> Comparison:
    matrices = [
        MatrixComparison(f"model.layers.{n}.mlp.down_proj", "GPTQ4", 4.16, n / 100, 0.5, 0, 1.0)
        for n in range(12)
    ]
    return Comparison(
        tokens=1000,
        matrices=matrices,
        drifts=[0.1, float("inf")],
        parent_bytes=10**9,
        own_bytes=4 * 10**8,
        bits_per_weight=4.16,
        parent_perplexity=10.0,
        own_perplexity=10.4,
        kl=0.03,
        top1=0.93,
    )


def test_a_sheet_fits_a_terminal() -> None:
    sheet = Sheet(parent="parent", model="model", comparison=_comparison(), text="a book")
    sheet.tokens_per_second = {"one stream": 12.5}
    lines = sheet.to_markdown().splitlines()
    assert max(map(len, lines)) <= 80
    assert "| perplexity                    |        10.000 | 10.400 (+4.0%) |" in lines
    assert sheet.worst()[0].path == "model.layers.11.mlp.down_proj"
    assert sheet.refusals() == []
    data = sheet.to_json()
    assert data["drifts"] == [0.1, None]  # JSON has no infinity
    json.dumps(data, allow_nan=False)
    long = "transformer.h.31.mlp.experts.127.and.something.more.down_proj"
    assert shortened(long).endswith("down_proj")
    assert len(shortened(long)) <= 46


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"own_perplexity": 16.0}, "perplexity rose by 60.0%; at most 50.0%"),
        ({"own_perplexity": float("nan")}, "perplexity rose by nan"),
        ({"kl": 0.7}, "KL to the parent is 0.700"),
    ],
)
def test_limits_are_said_with_what_was_found(given: dict[str, Any], reason: str) -> None:
    comparison = _comparison()
    for name, value in given.items():
        setattr(comparison, name, value)
    sheet = Sheet(parent="parent", model="model", comparison=comparison, text="a book")
    assert [r for r in sheet.refusals() if reason in r]


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="kl: got 0"):
        Limits(kl=0)


def test_smaller_groups_are_said(tmp_path: Path) -> None:
    source = LayerSource(write_tiny_checkpoint(tmp_path / "parent", config=EXPERTS))
    settings = QuantizeSettings(group_size=64)
    with torch.inference_mode():
        _, results = quantize(source, made_rows(source, tmp_path), settings, tmp_path / "result")
    notes = method_notes(results, settings)
    assert notes[0].startswith("groups of 32 instead of 64, which does not divide the width, in ")
    assert notes[0].endswith("such as model.layers.0.mlp.experts.0.down_proj")
