"""Files of compressed-tensors against the package of that name: what it writes is read as it reads
it itself, and written again byte for byte.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwenkit.formats.compressed_int import CompressedIntWeight
from qwenkit.formats.fp8 import Fp8Weight
from qwenkit.formats.packed import PackedWeight, pack
from qwenkit.layers.weight import QuantWeight

compressors = pytest.importorskip("compressed_tensors.compressors")
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

ROWS, COLUMNS = 48, 256


def _scheme(**weights: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(**weights)
    return QuantizationScheme(targets=["Linear"], weights=args)


def _made(bits: int, groups: int, *, symmetric: bool, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(bits + groups)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.02
    half = 1 << (bits - 1)
    grouped = weight.view(ROWS, groups, -1)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) / (half - 0.5)
        return {"weight": weight.to(dtype), "weight_scale": scale.to(dtype)}
    scale = ((high - low) / (2 * half - 1)).to(dtype)
    zeros = (-low / scale.float() - half).round().clamp(-half, half - 1).to(torch.int8)
    return {"weight": weight.to(dtype), "weight_scale": scale, "weight_zero_point": zeros}


def _assert_same(ours: QuantWeight, theirs: dict[str, torch.Tensor], numbers: torch.Tensor) -> None:
    packed = pack(ours)
    assert isinstance(packed, PackedWeight)
    for weight in (ours, packed):
        assert torch.equal(weight.dequantize(numbers.dtype), numbers)
        assert weight.to_tensors().keys() == theirs.keys()
        for name, tensor in weight.to_tensors().items():
            assert tensor.dtype == theirs[name].dtype
            assert torch.equal(tensor.float(), theirs[name].float()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "groups"), [(4, 2), (4, 1), (8, 2), (8, 1)])
def test_packed_numbers(bits: int, groups: int, symmetric: bool, dtype: torch.dtype) -> None:
    size = {"strategy": "channel"}
    if groups > 1:
        size = {"strategy": "group", "group_size": COLUMNS // groups}
    scheme = _scheme(num_bits=bits, symmetric=symmetric, **size)
    state = _made(bits, groups, symmetric=symmetric, dtype=dtype)
    theirs = compressors.PackedQuantizationCompressor.compress(state, scheme)
    numbers = compressors.PackedQuantizationCompressor.decompress(theirs, scheme)["weight"]
    ours = CompressedIntWeight.from_tensors(
        theirs, shape=(ROWS, COLUMNS), storage=f"COMPRESSED_INT{bits}"
    )
    _assert_same(ours, theirs, numbers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_whole_bytes(symmetric: bool, dtype: torch.dtype) -> None:
    scheme = _scheme(num_bits=8, symmetric=symmetric, strategy="channel")
    state = _made(8, 1, symmetric=symmetric, dtype=dtype)
    theirs = compressors.IntQuantizationCompressor.compress(state, scheme)
    numbers = compressors.IntQuantizationCompressor.decompress(theirs, scheme)["weight"]
    shape = (ROWS, COLUMNS)
    ours = CompressedIntWeight.from_tensors(theirs, shape=shape, storage="COMPRESSED_INT8")
    _assert_same(ours, theirs, numbers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("strategy", "storage"), [("channel", "FP8_ROWS"), ("tensor", "FP8"), ("block", "FP8_16X64")]
)
def test_eight_bit_floats(strategy: str, storage: str, dtype: torch.dtype) -> None:
    block = {"block_structure": [16, 64]} if strategy == "block" else {}
    scheme = _scheme(num_bits=8, type="float", strategy=strategy, symmetric=True, **block)
    weight = (torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.02).to(
        dtype
    )
    scale = {
        "channel": weight.abs().amax(1, keepdim=True),
        "tensor": weight.abs().amax().view(1),
        "block": weight.view(ROWS // 16, 16, COLUMNS // 64, 64).abs().amax((1, 3)),
    }[strategy]
    state = {"weight": weight, "weight_scale": (scale / 448).to(dtype)}
    theirs = compressors.FloatQuantizationCompressor.compress(state, scheme)
    numbers = compressors.FloatQuantizationCompressor.decompress(theirs, scheme)["weight"]
    ours = Fp8Weight.from_tensors(theirs, shape=(ROWS, COLUMNS), storage=storage)
    _assert_same(ours, theirs, numbers.to(dtype))
