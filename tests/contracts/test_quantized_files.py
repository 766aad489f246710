"""Every published layout of quantized weights: a checkpoint in it computes as its twin of plain
numbers does, runs in panels, is written again byte for byte, and what is wrong with it is named.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantized_files import LAYOUTS, Written, write_quantized
from qwenkit.errors import CheckpointError, ConfigError, NonFiniteError
from qwenkit.formats.packed import PackedWeight
from qwenkit.formats.plan import WeightPlan
from qwenkit.formats.spec import formats
from qwenkit.kernels.cpu import bind
from qwenkit.layers.attention import PackedCausal
from qwenkit.layers.weight import QuantWeight
from qwenkit.load import load
from qwenkit.models.published import published_tensors
from qwenkit.models.spec import CausalModel

LAYER = "model.layers.1.mlp.down_proj"
IDS = torch.randint(0, 256, (400,), generator=torch.Generator().manual_seed(3))
_layouts = pytest.mark.parametrize("name", LAYOUTS)


def logits(model: CausalModel) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(IDS, PackedCausal([len(IDS)]))  # [tokens, vocab_size]
        return result


def weights(model: CausalModel) -> list[QuantWeight]:
    found = [m for m in model.modules() if isinstance(m, QuantWeight)]
    assert found
    return found


def test_every_format_but_ggml_has_a_layout(tmp_path: Path) -> None:
    classes = {type(layout.quantize(torch.ones(64, 128))) for layout in LAYOUTS.values()}
    assert classes == {f.weight for f in formats()} - {
        f.weight for f in formats() if f.name == "ggml"
    }


@_layouts
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_it_computes_as_its_twin(name: str, experts: bool, tmp_path: Path) -> None:
    written = write_quantized(tmp_path, LAYOUTS[name], experts=experts)
    twin = logits(load(written.twin).model)
    model = load(written.folder).model
    assert not any(isinstance(w, PackedWeight) for w in weights(model))
    assert (logits(model) - twin).abs().max() <= 1e-4 * twin.abs().max()
    bind.register()
    native = load(written.folder, plan=WeightPlan()).model
    assert all(isinstance(w, PackedWeight) for w in weights(native))
    got = logits(native)
    assert (got.argmax(1) == twin.argmax(1)).float().mean() >= 0.98
    spread = twin - twin.mean(1, keepdim=True)
    assert (got - twin).norm() / spread.norm() < (0.06 if experts else 0.03)  # others are chosen
    if experts and name == "nf4 twice":
        return  # the places of magnitudes are lost where experts stand below each other
    for named in published_tensors(native):
        assert torch.equal(_raw(named.tensor), _raw(written.tensors[named.name])), named.name


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def _scales(written: Written) -> str:
    """The tensor of scales of one layer."""
    parts = ("scales", "weight_scale", "weight_scale_inv", "SCB", "weight.nested_absmax")
    names = [f"{LAYER}.{p}" for p in (*parts, "weight.absmax")]
    return next(n for n in names if n in written.tensors)


def _numbers(written: Written) -> str:
    names = [f"{LAYER}.{p}" for p in ("qweight", "weight_packed", "weight")]
    return next(n for n in names if n in written.tensors)


@_layouts
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("plan", [None, WeightPlan()], ids=["stored", "packed"])
def test_a_bad_scale_is_named(
    name: str, bad: float, plan: WeightPlan | None, tmp_path: Path
) -> None:
    written = write_quantized(tmp_path, LAYOUTS[name])
    scales = written.tensors[_scales(written)].clone()
    scales.view(-1)[0] = bad
    written.rewrite({_scales(written): scales})
    with pytest.raises(NonFiniteError, match=rf"{LAYER}.*(NaN or infinite)"):
        load(written.folder, plan=plan)


@_layouts
def test_what_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    written = write_quantized(tmp_path, LAYOUTS[name])
    numbers, scales = _numbers(written), _scales(written)
    stored = written.tensors[numbers]
    other = stored.T if stored.shape[1] > 1 else stored[:-1]  # a transposed pack, or a short one
    for part, value in (
        (numbers, other.contiguous()),
        (scales, written.tensors[scales].view(-1)[:0]),
        (scales, None),
        (numbers, None),
    ):
        written.rewrite({part: value})
        with pytest.raises(CheckpointError, match=LAYER):
            load(written.folder)


def _with_config(written: Written, **changes: Any) -> Path:
    file = written.folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))
    return written.folder


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (
            "gptq 4 sym",
            {"checkpoint_format": "gptq_v2"},
            r"mlp|attn.*zero points are all 7.*'gptq'",
        ),
        ("gptq 4 sym", {"bits": 8}, "qweight: got"),
        ("gptq 4 sym", {"group_size": 128}, "group_size: is 128, but 128 columns have 2 groups"),
        ("awq gemm", {"group_size": 32}, "qzeros|scales: got"),
        ("awq gemm", {"version": "gemv"}, "qzeros: got"),
        ("nf4", {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type: is 'fp4'.*nf4"),
        ("llm.int8", {"load_in_8bit": False}, "load_in_8bit"),
        ("w4a16", {"format": "marlin-24"}, "format: got 'marlin-24'"),
        ("w4a16 asym", {"config_groups": {}}, "config_groups: got"),
        ("fp8 blocks", {"weight_block_size": [128, 128]}, "weight_scale_inv: got"),
        ("fp8 blocks", {"fmt": "e5m2"}, "fmt: got 'e5m2'"),
        ("awq gemm", {"modules_to_not_convert": ["down_proj"]}, "down_proj: .*excludes it in"),
        ("gptq 4 sym", {"dynamic": {"-:.*down_proj": {}}}, "down_proj: .*excludes it in dynamic"),
        ("w8a8", {"ignore": ["re:.*down_proj"]}, "down_proj: .*excludes it in ignore"),
    ],
)
def test_a_config_that_contradicts_is_refused(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    written = write_quantized(tmp_path, LAYOUTS[name])
    load(written.folder)
    with pytest.raises(CheckpointError, match=said):
        load(_with_config(written, **changes))


def test_the_second_convention_in_a_file_of_the_first_is_refused(tmp_path: Path) -> None:
    written = write_quantized(tmp_path, LAYOUTS["gptq 4 sym"])
    name = f"{LAYER}.qzeros"
    second = (written.tensors[name] + 0x11111111).to(torch.int32)
    written.rewrite({name: second})
    with pytest.raises(CheckpointError, match=rf"{LAYER}.*zero points are all 9.*'gptq_v2'"):
        load(written.folder)


@pytest.mark.parametrize("method", ["gptqq", "hqq", None])
def test_unknown_methods_are_refused(method: str | None, tmp_path: Path) -> None:
    written = write_quantized(tmp_path, LAYOUTS["gptq 4 sym"])
    with pytest.raises(ConfigError, match=rf"quant_method is {method!r}.*gptq"):
        load(_with_config(written, quant_method=method))


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "fp8"])
def test_a_config_of_another_method_is_refused(method: str, tmp_path: Path) -> None:
    written = write_quantized(tmp_path, LAYOUTS["w8a8"])
    with pytest.raises(CheckpointError, match=f"says '{method}', but no weight is stored so"):
        load(_with_config(written, quant_method=method))


def test_an_own_layout_of_autoround_is_refused(tmp_path: Path) -> None:
    written = write_quantized(tmp_path, LAYOUTS["auto-round"])
    with pytest.raises(ConfigError, match="packing_format is 'auto_round:llm_compressor'"):
        load(_with_config(written, packing_format="auto_round:llm_compressor"))
