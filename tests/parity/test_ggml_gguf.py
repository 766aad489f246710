"""GGML blocks against gguf-py: the same numbers from any bytes, the same bytes from any numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwenkit.formats.ggml_quantize import quantize_blocks
from qwenkit.kernels.blocks import BLOCK_LAYOUTS, example_blocks
from qwenkit.kernels.ops.block_dequantize import block_dequantize

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.oracle

_EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.mark.parametrize("block_type", BLOCK_LAYOUTS)
def test_block_sizes_are_the_same(block_type: str) -> None:
    layout = BLOCK_LAYOUTS[block_type]
    expected = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[block_type]]
    assert (layout.block_columns, layout.block_bytes) == expected


@pytest.mark.parametrize("block_type", BLOCK_LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e-8, 6e4])
def test_numbers_are_bit_equal(block_type: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(11)
    blocks = example_blocks(block_type, (150, 1024), scale=scale, generator=generator)
    expected = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[block_type])
    numbers = block_dequantize.reference(blocks, block_type, torch.float32).numpy()
    assert np.isfinite(numbers).all()
    assert np.array_equal(numbers.view(np.uint32), expected.view(np.uint32))  # signs of zero too


@pytest.mark.parametrize("block_type", BLOCK_LAYOUTS)
def test_any_finite_half_gives_bit_equal_numbers(block_type: str) -> None:
    halves = torch.arange(0, 1 << 16, 3, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[torch.isfinite(halves)]
    layout = BLOCK_LAYOUTS[block_type]
    generator = torch.Generator().manual_seed(12)
    blocks = torch.randint(
        256, (len(halves), layout.block_bytes), dtype=torch.uint8, generator=generator
    )
    for offset in layout.half_offsets:
        order = torch.randperm(len(halves), generator=generator)
        blocks[:, offset : offset + 2] = halves[order].unsqueeze(1).view(torch.uint8)
    expected = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[block_type])
    numbers = block_dequantize.reference(blocks, block_type, torch.float32).numpy()
    assert np.array_equal(numbers.view(np.uint32), expected.view(np.uint32))


def _matrices() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(13)
    normal = torch.randn(64, 256, generator=generator)
    halves = torch.randint(-20, 20, (64, 256), generator=generator) / 2  # many ties
    flat = torch.randn(64, 1, generator=generator).expand(64, 256).contiguous()
    signs = torch.where(normal > 0, 1.0, -1.0)  # the extreme occurs with both signs
    zeros = torch.zeros(64, 256)
    zeros[::2] = -0.0
    wide = normal * 10.0 ** torch.randint(-12, 5, (64, 256), generator=generator)
    return {
        "normal": normal,
        "small": normal * 1e-3,
        "tiny": normal * 1e-7,  # scales at and below half precision's smallest
        "ties": halves,
        "flat": flat,
        "signs": signs,
        "zeros": zeros,
        "wide": wide,
        "shifted": normal + 5,
        "bfloat16": normal.to(torch.bfloat16).float(),
    }


@pytest.mark.parametrize("block_type", _EXACT)
@pytest.mark.parametrize("name", _matrices())
def test_bytes_are_equal(block_type: str, name: str) -> None:
    matrix = _matrices()[name]
    expected = gguf.quantize(matrix.numpy(), gguf.GGMLQuantizationType[block_type])
    assert np.array_equal(quantize_blocks(matrix, block_type).numpy(), expected)
