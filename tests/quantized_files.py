"""Small random checkpoints in every published layout of quantized weights, beside their twins of
plain numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenkit.checkpoint import write_safetensors
from qwenkit.formats.awq import AwqWeight
from qwenkit.formats.bnb4 import Bnb4Weight
from qwenkit.formats.compressed_int import CompressedIntWeight
from qwenkit.formats.fp8 import Fp8Weight
from qwenkit.formats.gptq import GptqWeight
from qwenkit.formats.llm_int8 import LlmInt8Weight
from qwenkit.layers.weight import QuantWeight
from tiny import CONFIG, tiny_tensors, write_tiny_checkpoint

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
EXPERTS = {
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
SCALE, LEAN = 8, 0.3
Quantize = Callable[[torch.Tensor], QuantWeight]


@dataclass(frozen=True, slots=True)
class Layout:
    """`quantize` makes a layer's weight, `config` is the block in config.json; `bias` gives every
    layer one, as some quantizers do.
    """

    quantize: Quantize
    config: dict[str, Any]
    bias: bool = False


def _integers(
    weight: torch.Tensor, bits: int, group: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round to nearest: numbers uint8 [rows, columns], scales and zero points [rows, groups]."""
    rows, top = weight.shape[0], (1 << bits) - 1
    grouped = weight.view(rows, -1, group)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / top).half().float()
    zeros = torch.full_like(low, 1 << (bits - 1)) if symmetric else (-low / scales).round()
    numbers = (grouped / scales[:, :, None] + zeros[:, :, None]).round().clamp(0, top)
    return numbers.view(rows, -1).to(torch.uint8), scales, zeros.to(torch.uint8)


def gptq(
    bits: int, group: int, *, symmetric: bool, v2: bool = False, order: bool = False
) -> Quantize:
    """GPTQ's layout; with `order` groups are of columns that lie apart."""

    def quantize(weight: torch.Tensor) -> QuantWeight:
        columns = weight.shape[1]
        size = columns if group < 0 else group
        places = torch.arange(columns)
        if order:
            places = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
        numbers, scales, zeros = _integers(weight[:, places], bits, size, symmetric=symmetric)
        g_idx = torch.empty(columns, dtype=torch.int64)
        g_idx[places] = torch.arange(columns) // size
        numbers = torch.empty_like(numbers).index_copy_(1, places, numbers)
        return GptqWeight.from_integers(numbers, scales, zeros, g_idx, bits=bits, is_v2=v2)

    return quantize


def awq(layout: str, group: int) -> Quantize:
    def quantize(weight: torch.Tensor) -> QuantWeight:
        numbers, scales, zeros = _integers(weight, 4, group, symmetric=False)
        return AwqWeight.from_integers(numbers, scales, zeros, layout=layout)

    return quantize


def compressed(bits: int, group: int, *, symmetric: bool, packed: bool) -> Quantize:
    def quantize(weight: torch.Tensor) -> QuantWeight:
        size, half = (weight.shape[1] if group < 0 else group), 1 << (bits - 1)
        numbers, scales, zeros = _integers(weight, bits, size, symmetric=symmetric)
        lowered = (numbers.to(torch.int16) - half).to(torch.int8)
        points = None if symmetric else (zeros.to(torch.int16) - half).to(torch.int8)
        return CompressedIntWeight.from_integers(
            lowered, scales.half(), points, bits=bits, is_packed=packed
        )

    return quantize


def fp8(grid: str) -> Quantize:
    """In "blocks", or with a scale for "rows" or for the whole "tensor"."""

    def quantize(weight: torch.Tensor) -> QuantWeight:
        rows, columns = weight.shape
        if grid == "blocks":
            return Fp8Weight.quantize(weight, block=(64, 64))
        made = Fp8Weight.quantize(weight, block=(1 if grid == "rows" else rows, columns))
        tensors = {"weight": made.weight, "weight_scale": made.scale}
        tag = "FP8_ROWS" if grid == "rows" else "FP8"
        return Fp8Weight.from_tensors(tensors, shape=(rows, columns), storage=tag)

    return quantize


def _compressed_config(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


_FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True}
LAYOUTS: Mapping[str, Layout] = {
    "gptq 4 sym": Layout(
        gptq(4, 64, symmetric=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True},
        bias=True,
    ),
    "gptq 4 asym v2": Layout(
        gptq(4, 32, symmetric=False, v2=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
    ),
    "gptq 4 act-order": Layout(
        gptq(4, 64, symmetric=False, order=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True},
    ),
    "gptq 8": Layout(
        gptq(8, 64, symmetric=True), {"quant_method": "gptq", "bits": 8, "group_size": 64}
    ),
    "gptq 8 rows": Layout(
        gptq(8, -1, symmetric=False), {"quant_method": "gptq", "bits": 8, "group_size": -1}
    ),
    "gptq 3": Layout(
        gptq(3, 32, symmetric=False), {"quant_method": "gptq", "bits": 3, "group_size": 32}
    ),
    "gptq 2": Layout(
        gptq(2, 32, symmetric=False), {"quant_method": "gptq", "bits": 2, "group_size": 32}
    ),
    "auto-round": Layout(
        gptq(4, 64, symmetric=True),
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": 4,
            "group_size": 64,
            "sym": True,
        },
    ),
    "awq gemm": Layout(
        awq("gemm", 64),
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"},
    ),
    "awq gemv": Layout(
        awq("gemv", 64),
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"},
    ),
    "nf4": Layout(lambda w: Bnb4Weight.quantize(w, "nf4"), _FOUR | {"bnb_4bit_quant_type": "nf4"}),
    "nf4 twice": Layout(
        lambda w: Bnb4Weight.quantize(w, "nf4", nested=True),
        _FOUR | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    "fp4": Layout(lambda w: Bnb4Weight.quantize(w, "fp4"), _FOUR | {"bnb_4bit_quant_type": "fp4"}),
    "llm.int8": Layout(
        LlmInt8Weight.quantize,
        {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": ["lm_head"],
        },
    ),
    "w4a16": Layout(
        compressed(4, 64, symmetric=True, packed=True),
        _compressed_config(
            "pack-quantized", num_bits=4, strategy="group", group_size=64, symmetric=True
        ),
    ),
    "w4a16 asym": Layout(
        compressed(4, 32, symmetric=False, packed=True),
        _compressed_config(
            "pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False
        ),
    ),
    "w8a8": Layout(
        compressed(8, -1, symmetric=True, packed=False),
        _compressed_config("int-quantized", num_bits=8, strategy="channel", symmetric=True),
    ),
    "w8a8 fp8": Layout(
        fp8("rows"),
        _compressed_config("float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
    "fp8 blocks": Layout(
        fp8("blocks"),
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64]},
    ),
    "fp8 tensor": Layout(fp8("tensor"), {"quant_method": "fp8", "activation_scheme": "static"}),
}


def is_quantized(name: str) -> bool:
    """Whether layouts quantize the tensor of this published name, as all published files do."""
    own = name.endswith("_proj.weight")
    return own and "gate_proj" not in name.split(".")[:-2]


@dataclass(frozen=True, slots=True)
class Written:
    """A quantized checkpoint and its twin; `tensors` are those of the quantized file."""

    folder: Path
    twin: Path
    tensors: dict[str, torch.Tensor]

    def rewrite(self, changes: Mapping[str, torch.Tensor | None]) -> Path:
        """The quantized folder with some tensors replaced, or left out where they are None."""
        tensors = {n: t for n, t in (self.tensors | changes).items() if t is not None}
        write_safetensors(self.folder / "model.safetensors", tensors)
        return self.folder


def write_quantized(tmp_path: Path, layout: Layout, *, experts: bool = False) -> Written:
    """Write both folders."""
    config = CONFIG | SIZES | (EXPERTS if experts else {})
    plain = tiny_tensors(config)
    plain = {n: t if t.dim() < 2 else t / 3 for n, t in plain.items()}
    # As in a trained model, the best token is mostly better than the second by more than eight bits
    # may change: the head leans to the token after the last one.
    plain["model.embed_tokens.weight"] *= SCALE
    plain["lm_head.weight"] += plain["model.embed_tokens.weight"].roll(1, 0) * LEAN
    quantized, twin = {}, {}
    for name, tensor in plain.items():
        if not is_quantized(name):
            quantized[name] = twin[name] = tensor
            continue
        weight = layout.quantize(tensor)
        path = name.removesuffix(".weight")
        for part, value in weight.to_tensors().items():
            quantized[f"{path}.{part}"] = value
        twin[name] = weight.dequantize(torch.float32)
        if layout.bias and f"{path}.bias" not in plain:
            quantized[f"{path}.bias"] = torch.zeros(tensor.shape[0])
    block = {"quantization_config": layout.config}
    folder = write_tiny_checkpoint(tmp_path / "quantized", config=config | block, tensors=quantized)
    other = write_tiny_checkpoint(tmp_path / "twin", config=config, tensors=twin)
    return Written(folder, other, quantized)
