"""Blocks of a GGML type to plain numbers (layouts: `qwenkit.kernels.blocks`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.kernels.blocks import (
    BLOCK_LAYOUTS,
    block_layout,
    example_blocks,
    row_chunks,
    unpack_rows,
)
from qwenkit.kernels.registry import Arguments, Op


def _reference(blocks: torch.Tensor, block_type: str, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [..., bytes_per_row] to [..., columns]: computed in fp32, then rounded to `dtype`."""
    layout = block_layout(block_type)
    result = _shape(blocks, block_type, dtype)
    rows = blocks.reshape(-1, blocks.shape[-1])
    flat = result.view(-1, result.shape[-1])
    for chunk in row_chunks(*flat.shape):
        flat[chunk] = unpack_rows(rows[chunk], layout)  # a chunk at a time spares memory
    return result


def _shape(blocks: torch.Tensor, block_type: str, dtype: torch.dtype) -> torch.Tensor:
    columns = block_layout(block_type).columns(blocks.shape[-1])
    return torch.empty((*blocks.shape[:-1], columns), dtype=dtype, device=blocks.device)


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for name, layout in BLOCK_LAYOUTS.items():
        for rows, blocks_per_row in ((1, 1), (5, 3), (37, 1)):
            shape = (rows, blocks_per_row * layout.block_columns)
            for scale in (1.0, 3e-8, 6e4):  # usual, subnormal and nearly infinite halves
                blocks = example_blocks(name, shape, scale=scale, generator=generator)
                yield blocks, name, torch.float32
        row = example_blocks(name, (1, layout.block_columns), scale=0.1, generator=generator)
        yield row, name, torch.bfloat16
        yield row, name, torch.float16
        yield row[0], name, torch.float32
        yield row.expand(2, 3, -1), name, torch.float32
        yield row[:0], name, torch.float32
        yield torch.zeros_like(row), name, torch.float32


block_dequantize = Op(
    name="block_dequantize",
    schema="(Tensor blocks, str block_type, ScalarType dtype) -> Tensor",
    reference=_reference,
    shape=_shape,
    cases=_cases,
)
