"""NF4, FP4 and Int8 against bitsandbytes on a processor: the bytes that it writes, and the numbers
that it reads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwenkit.formats.bnb4 import Bnb4Weight
from qwenkit.formats.bnb4_quantize import dynamic_map
from qwenkit.formats.llm_int8 import LlmInt8Weight
from qwenkit.formats.packed import PackedWeight, pack
from qwenkit.kernels.cpu import bind

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


def _matrices() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(48, 192, generator=generator) * 0.02
    wide = normal * 10.0 ** torch.randint(-9, 5, (48, 192), generator=generator)
    zeros = normal.clone()
    zeros[3] = 0
    zeros[5, 64:128] = -0.0
    ties = torch.randint(-8, 9, (48, 192), generator=generator) / 8
    return {
        "normal": normal,
        "bfloat16": normal.to(torch.bfloat16),
        "float16": normal.to(torch.float16),
        "wide": wide,
        "zeros": zeros,
        "ties": ties,
        "odd": torch.randn(37, 70, generator=generator),  # no whole blocks
        "large": torch.randn(300, 1024, generator=generator),
    }


_names = pytest.mark.parametrize("name", _matrices())


def _theirs(weight: torch.Tensor, kind: str, size: int, nested: bool) -> tuple[Any, Any]:
    return functional.quantize_4bit(
        weight, blocksize=size, quant_type=kind, compress_statistics=nested
    )


@_names
@pytest.mark.parametrize("nested", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize(("kind", "size"), [("nf4", 64), ("fp4", 64), ("nf4", 128), ("fp4", 256)])
def test_four_bits_are_written_and_read_alike(
    name: str, kind: str, size: int, nested: bool
) -> None:
    weight = _matrices()[name]
    packed, state = _theirs(weight, kind, size, nested)
    theirs = {"weight": packed}
    theirs |= {f"weight.{n}": t for n, t in state.as_dict(packed=True).items()}
    ours = Bnb4Weight.quantize(weight, kind, blocksize=size, nested=nested)
    tensors = ours.to_tensors()
    assert tensors.keys() == theirs.keys()
    for part, tensor in theirs.items():
        assert tensors[part].dtype == tensor.dtype
        if nested and part == "weight.absmax":
            _assert_nearly_the_same_places(tensors[part], tensor, weight, size)
        else:
            assert torch.equal(tensors[part], tensor), part
    read = Bnb4Weight.from_tensors(theirs, shape=tuple(weight.shape), storage=kind.upper())
    numbers = _their_numbers(packed, state).to(weight.dtype)
    assert torch.equal(read.dequantize(weight.dtype), numbers)


def _assert_nearly_the_same_places(
    ours: torch.Tensor, theirs: torch.Tensor, weight: torch.Tensor, size: int
) -> None:
    """On a processor bitsandbytes looks the level up by the number rounded to a part of 32767.5; on
    a GPU it takes the nearest, as we do. So there are others only next to the border of two.
    """
    flat = torch.nn.functional.pad(weight.flatten().float(), (0, -weight.numel() % size))
    absmax = flat.view(-1, size).abs().amax(1)
    values = absmax - absmax.mean()
    filled = torch.nn.functional.pad(values, (0, -len(values) % 256)).view(-1, 256)
    most = filled.abs().amax(1, keepdim=True).clamp(min=1e-38)
    scaled = (filled / most).flatten()[: len(values)]
    levels = dynamic_map()
    off = [(scaled - levels[places.int()]).abs() for places in (ours, theirs)]
    differ = (ours != theirs) & (values.abs().max() > 0)  # without any, a place means nothing
    assert (off[0] <= off[1] + 1e-7).all()
    assert (off[1] - off[0])[differ].lt(2 / 32767.5).all()
    assert len(scaled[differ].unique()) < 0.02 * len(scaled) + 1


def _their_numbers(packed: Any, state: Any) -> torch.Tensor:
    if state.shape[1] % state.blocksize == 0:
        return functional.dequantize_4bit(packed, state)
    # Of rows that are no whole blocks version 0.50.2 reads something else on a processor than it
    # wrote: here by the description of the layout.
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    both = packed.flatten()
    levels = state.code[torch.stack((both >> 4, both & 15), 1).flatten().int()]
    numbers = levels * absmax.repeat_interleave(state.blocksize)[: len(levels)]
    return numbers.view(state.shape)


def test_the_levels_of_magnitudes_are_the_same() -> None:
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())


@_names
def test_eight_bits_are_written_and_read_alike(name: str) -> None:
    weight = _matrices()[name]
    if name == "wide":
        weight = weight.clamp(-6e4, 6e4)
    ours = LlmInt8Weight.quantize(weight)
    numbers, most, _ = functional.int8_vectorwise_quant(weight.half())
    rows = most > 0  # where all are zeros bitsandbytes divides by zero
    assert torch.equal(ours.weight[rows], numbers[rows])
    assert torch.equal(ours.scb, most)
    theirs = functional.int8_vectorwise_dequant(ours.weight, ours.scb)
    assert torch.equal(ours.dequantize(torch.float32), theirs)


def test_outliers_are_kept_at_least_as_well() -> None:
    """Native products beside bitsandbytes' split of the columns that reach 6."""
    bind.register()
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(256, 512, generator=generator) * 0.02
    x = torch.randn(40, 512, generator=generator)
    x[:, [7, 300, 301]] *= 60
    ours = LlmInt8Weight.quantize(weight)
    exact = x.double() @ ours.dequantize(torch.float32).double().T
    packed = pack(ours)
    assert isinstance(packed, PackedWeight)
    layer = bitsandbytes.nn.Linear8bitLt(
        512, 256, bias=False, has_fp16_weights=False, threshold=6.0
    )
    layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    with torch.inference_mode():
        theirs = layer.to("cpu").eval()(x)
    error = [float((y.double() - exact).norm() / exact.norm()) for y in (packed.matmul(x), theirs)]
    assert error[0] < 0.01
    assert error[0] < 1.1 * error[1]
