"""Activations times a transposed matrix that stays in GGML blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels.blocks import (
    BLOCK_LAYOUTS,
    block_layout,
    example_blocks,
    row_chunks,
    unpack_rows,
)
from qwenkit.kernels.registry import Arguments, Op


def _reference(x: torch.Tensor, blocks: torch.Tensor, block_type: str) -> torch.Tensor:
    """x [tokens, columns], blocks uint8 [rows, bytes_per_row] to [tokens, rows] in x's dtype.

    Multiplies in fp32, and only a few rows of the matrix are numbers at any time.
    """
    layout = block_layout(block_type)
    result = _shape(x, blocks, block_type)
    if not x.shape[0]:
        return result
    wide = x.to(torch.float32)
    for chunk in row_chunks(blocks.shape[0], x.shape[1]):
        result[:, chunk] = wide @ unpack_rows(blocks[chunk], layout).T  # [tokens, chunk]
    return result


def _shape(x: torch.Tensor, blocks: torch.Tensor, block_type: str) -> torch.Tensor:
    columns = block_layout(block_type).columns(blocks.shape[1])
    if x.shape[1] != columns:
        raise KernelError(
            f"block_matmul: x has {x.shape[1]} columns, but rows of {blocks.shape[1]} bytes of "
            f"{block_type} hold {columns}."
        )
    return x.new_empty((x.shape[0], blocks.shape[0]))


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for name, layout in BLOCK_LAYOUTS.items():
        for tokens, rows, blocks_per_row in ((1, 1, 1), (1, 37, 3), (3, 5, 2), (9, 67, 1)):
            columns = blocks_per_row * layout.block_columns
            blocks = example_blocks(name, (rows, columns), scale=0.02, generator=generator)
            first = unpack_rows(blocks[:1], layout)
            # Close to one row, so that outputs do not cancel and an error has something to be
            # relative to.
            x = torch.randn(tokens, columns, generator=generator) + first / first.std()
            yield x, blocks, name
            outliers = x.clone()
            outliers[:, first.abs().argmax()] = 1e4  # of Qwen's size
            yield outliers, blocks, name
        blocks[::2] = 0
        yield x, blocks, name
        yield torch.zeros_like(x), blocks, name
        yield x.to(torch.bfloat16), blocks, name
        yield x[:0], blocks, name
        for scale in (3e-8, 6e4):  # subnormal and nearly infinite halves
            blocks = example_blocks(name, (rows, columns), scale=scale, generator=generator)
            yield x, blocks, name


block_matmul = Op(
    name="block_matmul",
    schema="(Tensor x, Tensor blocks, str block_type) -> Tensor",
    reference=_reference,
    shape=_shape,
    cases=_cases,
    tolerance=2e-2,  # a backend may round activations to eight bits per block of 32
)
