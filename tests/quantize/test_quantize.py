"""Whole models quantized: nearer than rounding, in files that load, resumed to the same bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantized_made import DENSE, EXPERTS, compared, made_rows, write_quantized
from qwenkit.errors import CheckpointError, UsageError
from qwenkit.formats.awq import AwqWeight
from qwenkit.formats.bnb4 import Bnb4Weight
from qwenkit.formats.gptq import GptqWeight
from qwenkit.formats.llm_int8 import LlmInt8Weight
from qwenkit.formats.stacked import StackedWeight
from qwenkit.layers.attention import PackedCausal
from qwenkit.layers.weight import QuantWeight
from qwenkit.load import load
from qwenkit.quantize import stream
from qwenkit.quantize.anatomy import Part, layer_parts, matrices
from qwenkit.quantize.layer import LayerQuantizer, MatrixResult
from qwenkit.quantize.run import Step, quantize
from qwenkit.quantize.settings import QuantizeSettings, Rule, Target
from qwenkit.quantize.stream import LayerSource
from tiny import write_tiny_checkpoint

FIRST: dict[str, Any] = {
    "model_type": "qwen",
    "hidden_size": 64,
    "intermediate_size": 192,  # both halves
    "num_key_value_heads": 4,
    "seq_length": 512,
}
BAICHUAN: dict[str, Any] = {
    "model_type": "baichuan",
    "hidden_size": 64,
    "intermediate_size": 96,
    "model_max_length": 512,
    "z_loss_weight": 0,
    "max_position_embeddings": None,
}
QWEN3: dict[str, Any] = DENSE | {"model_type": "qwen3", "head_dim": 16}


def _settings(method: str, **given: Any) -> QuantizeSettings:
    return QuantizeSettings(**{"method": method, "bits": 3, "group_size": 32} | given)


def _logits(path: Path, ids: tuple[int, ...]) -> torch.Tensor:
    model = load(path).model
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor(ids), PackedCausal([len(ids)]))
    return logits


@pytest.mark.parametrize(
    "config",
    [DENSE, EXPERTS, FIRST, BAICHUAN, QWEN3],
    ids=["qwen2", "qwen2_moe", "qwen", "baichuan", "qwen3"],
)
def test_what_looks_at_data_is_nearer_than_rounding(tmp_path: Path, config: dict[str, Any]) -> None:
    errors, kls = {}, {}
    for method, given in (
        ("rtn", {}),
        ("gptq", {}),
        ("awq", {}),
        ("rtn", {"symmetric": False}),
    ):
        folder = tmp_path / f"{method}{len(given)}"
        source, path, rows = write_quantized(folder, _settings(method, **given), config=config)
        found = compared(source, path, rows)
        assert found.kl is not None
        key = method + ("_zero" if given else "")
        kls[key] = found.kl
        errors[key] = sum(m.error for m in found.matrices) / len(found.matrices)
    assert errors["gptq"] < 0.8 * errors["rtn"]
    assert errors["awq"] < 0.9 * errors["rtn_zero"]
    assert kls["gptq"] < kls["rtn"]
    assert kls["awq"] < kls["rtn_zero"]


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_is_written_loads_as_what_was_computed_with(
    tmp_path: Path, method: str, config: dict[str, Any]
) -> None:
    source, path, rows = write_quantized(tmp_path, _settings(method, bits=4), config=config)
    ids = rows.judging[0]
    model = load(path).model
    kind = AwqWeight if method == "awq" else GptqWeight
    weights = [m for m in model.modules() if isinstance(m, QuantWeight) and not list(m.children())]
    assert weights
    assert {type(weight) for weight in weights} == {kind}
    found = compared(source, path, rows)
    assert found.own_perplexity is not None
    logits = _logits(path, ids)
    again = compared(LayerSource(path), path, rows)
    assert again.kl == pytest.approx(0.0, abs=1e-6)
    assert again.own_perplexity == pytest.approx(found.own_perplexity, rel=1e-4)
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_folded_scales_change_no_function(tmp_path: Path, config: dict[str, Any]) -> None:
    source = LayerSource(write_tiny_checkpoint(tmp_path, config=config))
    layer, _ = source.layer(0)
    before, _ = source.layer(0)
    paths = [path for path, _, _ in matrices(layer_parts(layer, source.anatomy))]
    targets = dict.fromkeys(paths, Target(4, 32))
    quantizer = LayerQuantizer("layer", _settings("awq"), targets, lambda result: None)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    x[:, ::9] *= 20  # channels that carry much, which are what is scaled
    context = source.context([40])

    def flow() -> Iterator[tuple[torch.Tensor, PackedCausal]]:
        yield x, context

    with torch.inference_mode():
        for part, other in zip(
            layer_parts(layer, source.anatomy), layer_parts(before, source.anatomy), strict=True
        ):
            sums = quantizer._gather(part, tuple(part.feeds()), flow)
            quantizer._fold(part, sums)
            y, expected = part.run(x, context), other.run(x, context)
            assert torch.allclose(y, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
            assert not torch.allclose(part.norm.weight, other.norm.weight, rtol=0.01)
            for feed in part.stages[1]:
                assert feed.source is not None
                own, theirs = (m.get_submodule(feed.source) for m in (layer, before))
                assert not torch.allclose(own.weight, theirs.weight, rtol=0.01)
            again = quantizer._gather(part, tuple(part.feeds()), flow)
            for feed in part.feeds():  # the sums are those of the folded part's own inputs
                ours, new = sums[id(feed)].each[0], again[id(feed)].each[0]
                near = 1e-3 * float(new.matrix().abs().max())
                assert torch.allclose(ours.matrix(), new.matrix(), rtol=0, atol=near)


def test_act_order_is_said_and_read(tmp_path: Path) -> None:
    source, path, rows = write_quantized(tmp_path, _settings("gptq", act_order=True))
    block = json.loads((path / "config.json").read_text())["quantization_config"]
    assert block["desc_act"] is True
    weight = load(path).model.get_submodule("model.layers.1.mlp.up_proj").weight
    assert isinstance(weight, GptqWeight)
    assert weight.g_idx is not None
    assert not bool((weight.g_idx.diff() >= 0).all())
    plain, other, _ = write_quantized(tmp_path / "plain", _settings("gptq"))
    with_order, without = (compared(s, p, rows) for s, p in ((source, path), (plain, other)))
    mean = [sum(m.error for m in c.matrices) for c in (with_order, without)]
    assert mean[0] < mean[1]


def test_rules_give_layers_other_bits_or_none(tmp_path: Path) -> None:
    rules = (Rule("down_proj", 8), Rule(r"layers\.0\..*o_proj", None))
    source, path, rows = write_quantized(tmp_path, _settings("gptq", rules=rules))
    model = load(path).model
    bits = {
        name.removesuffix(".weight"): m.bits
        for name, m in model.named_modules()
        if isinstance(m, GptqWeight)
    }
    assert bits["model.layers.0.mlp.down_proj"] == bits["model.layers.1.mlp.down_proj"] == 8
    assert bits["model.layers.0.mlp.up_proj"] == 3
    assert "model.layers.0.self_attn.o_proj" not in bits
    block = json.loads((path / "config.json").read_text())["quantization_config"]
    assert block["bits"] == 3
    assert block["dynamic"] == {
        r"-:model\.layers\.0\.self_attn\.o_proj$": {},
        r"+:model\.layers\.0\.mlp\.down_proj$": {"bits": 8},
        r"+:model\.layers\.1\.mlp\.down_proj$": {"bits": 8},
    }
    found = {m.path: m.error for m in compared(source, path, rows).matrices}
    assert found["model.layers.0.self_attn.o_proj"] == 0.0
    assert found["model.layers.1.mlp.down_proj"] < 0.3 * found["model.layers.1.mlp.up_proj"]


def test_a_width_that_groups_do_not_divide_takes_smaller_ones(tmp_path: Path) -> None:
    source, path, rows = write_quantized(tmp_path, _settings("gptq", group_size=64))
    sizes = {
        name: m.shape[1] // m.scales.shape[0]
        for name, m in load(path).model.named_modules()
        if isinstance(m, GptqWeight)
    }
    assert sizes["model.layers.0.mlp.down_proj.weight"] == 32  # of 96 columns
    assert sizes["model.layers.0.mlp.up_proj.weight"] == 64
    block = json.loads((path / "config.json").read_text())["quantization_config"]
    assert block["group_size"] == 64
    assert block["dynamic"][r"+:model\.layers\.1\.mlp\.down_proj$"] == {"group_size": 32}
    assert compared(source, path, rows).own_perplexity is not None


def test_files_say_what_other_programs_read(tmp_path: Path) -> None:
    _, path, _ = write_quantized(tmp_path / "gptq", _settings("gptq", bits=4))
    config = json.loads((path / "config.json").read_text())
    block = json.loads((path / "quantize_config.json").read_text())
    assert config["quantization_config"] == block
    assert (block["quant_method"], block["bits"], block["group_size"]) == ("gptq", 4, 32)
    assert (block["sym"], block["desc_act"], block["checkpoint_format"]) == (True, False, "gptq")
    _, path, _ = write_quantized(tmp_path / "zeros", _settings("rtn", symmetric=False))
    block = json.loads((path / "quantize_config.json").read_text())
    assert (block["sym"], block["checkpoint_format"]) == (False, "gptq_v2")
    _, path, _ = write_quantized(tmp_path / "awq", _settings("awq", bits=4))
    config = json.loads((path / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    own = json.loads((path / "quant_config.json").read_text())
    assert own == {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    for name in ("tokenizer_config.json", "qwen.tiktoken", "generation_config.json"):
        assert (path / name).is_file()


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_the_methods_of_bitsandbytes_need_no_data(tmp_path: Path, config: dict[str, Any]) -> None:
    errors = []
    for method, kind in (("int8", LlmInt8Weight), ("nf4", Bnb4Weight), ("rtn", GptqWeight)):
        settings = QuantizeSettings(method=method, group_size=-1 if method == "rtn" else None)
        source, path, rows = write_quantized(tmp_path / method, settings, config=config)
        found = compared(source, path, rows)
        errors.append(sum(m.error for m in found.matrices) / len(found.matrices))
        kinds = {
            type(m)
            for m in load(path).model.modules()
            if isinstance(m, QuantWeight) and not isinstance(m, StackedWeight)
        }
        assert kinds == {kind}
    assert errors == sorted(errors)
    assert errors[0] < 0.1 * errors[1] < 0.095 * errors[2]
    block = json.loads((tmp_path / "nf4" / "result" / "config.json").read_text())
    block = block["quantization_config"]
    assert (block["quant_method"], block["bnb_4bit_quant_type"]) == ("bitsandbytes", "nf4")
    assert (block["load_in_4bit"], block["load_in_8bit"]) == (True, False)
    skipped = block["llm_int8_skip_modules"]
    assert skipped == (["lm_head", *_routers()] if config is EXPERTS else None)


def _routers() -> list[str]:
    names = ("gate", "shared_expert_gate")
    return [f"model.layers.{n}.mlp.{name}" for n in range(2) for name in names]


class _Killed(BaseException):
    """As sudden as a signal: nothing of the program catches it."""


def _digests(folder: Path) -> dict[str, str]:
    return {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.iterdir())
        if f.is_file()
    }


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_ended_work_goes_on_to_the_same_bytes(
    tmp_path: Path, method: str, config: dict[str, Any]
) -> None:
    settings = _settings(method, bits=4)
    _, whole, _ = write_quantized(tmp_path / "whole", settings, config=config)
    write_tiny_checkpoint(tmp_path / "parent", config=config)
    seen: list[int] = []
    for stop in (1, 4, 9, 10, 16, 1000):
        source = LayerSource(tmp_path / "parent")
        rows = made_rows(source, tmp_path)
        left = stop

        def told(step: Step) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise _Killed

        seen.append(stop - left)
        try:
            with torch.inference_mode():
                work, _ = quantize(source, rows, settings, tmp_path / "result", told=told)
        except _Killed:
            assert not (tmp_path / "result").exists()
            continue
        work.publish()
        break
    assert _digests(tmp_path / "result") == _digests(whole)
    assert not (tmp_path / "result.partial").exists()


def test_work_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "parent", config=DENSE)
    source = LayerSource(path)
    rows = made_rows(source, tmp_path)
    with torch.inference_mode():
        quantize(source, rows, _settings("gptq"), tmp_path / "result")
        with pytest.raises(UsageError, match="begun with another settings"):
            quantize(source, rows, _settings("awq"), tmp_path / "result")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        quantize(source, rows, _settings("rtn"), tmp_path / "taken")


def test_a_cut_file_of_activations_is_not_taken(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "parent", config=DENSE)
    source = LayerSource(path)
    rows = made_rows(source, tmp_path)

    def told(step: Step) -> None:
        if step.result is not None and ".layers.1." in step.result.path:
            raise _Killed

    with torch.inference_mode():
        with pytest.raises(_Killed):
            quantize(source, rows, _settings("gptq"), tmp_path / "result", told=told)
        file = tmp_path / "result.partial" / "activations-0001.bf16"
        file.write_bytes(file.read_bytes()[:-2])
        with pytest.raises(CheckpointError, match="missing or cut short"):
            quantize(source, rows, _settings("gptq"), tmp_path / "result")


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("config", [DENSE, FIRST, QWEN3], ids=["qwen2", "qwen", "qwen3"])
def test_what_a_last_matrix_reads_is_kept(
    tmp_path: Path, config: dict[str, Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes out of the first part is what it is when all is computed again, up to bf16."""
    written: list[torch.Tensor] = []
    put = stream.WrittenActivations.put
    monkeypatch.setattr(
        stream.WrittenActivations, "put", lambda own, at, y: (written.append(y), put(own, at, y))
    )
    firsts = []
    for keeps in (True, False):
        if not keeps:
            monkeypatch.setattr(Part, "last", None)
        write_quantized(tmp_path / str(keeps), _settings(method), config=config)
        assert not list(tmp_path.rglob("inputs.bf16"))
        firsts.append(written[1])  # the first is what comes into the first layer
        written.clear()
    kept, again = firsts
    assert not torch.equal(kept, again)
    assert (kept - again).abs().max() < 0.01 * again.abs().max()


def test_every_matrix_is_told_with_its_error(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "parent", config=EXPERTS)
    source = LayerSource(path)
    steps: list[Step] = []
    with torch.inference_mode():
        _, results = quantize(
            source,
            made_rows(source, tmp_path),
            _settings("gptq"),
            tmp_path / "result",
            told=steps.append,
        )
    told = [step.result for step in steps if step.result is not None]
    assert told == results
    assert all(isinstance(r, MatrixResult) and 0 < r.error < 1 for r in results)
    shares = [step.share for step in steps]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    paths = {r.path for r in results}
    assert "model.layers.1.mlp.experts.3.down_proj" in paths
    assert not any(path.endswith((".gate", "shared_expert_gate")) for path in paths)


def test_data_is_asked_for(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "parent", config=DENSE)
    source = LayerSource(path)
    rows = made_rows(source, tmp_path)
    nothing = type(rows)(calibration=(), judging=(), digest="", note="")
    with pytest.raises(UsageError, match="gptq needs text"):
        quantize(source, nothing, _settings("gptq"), tmp_path / "result")
    quantize(source, nothing, _settings("rtn"), tmp_path / "result")
