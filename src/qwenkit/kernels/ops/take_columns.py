"""Columns in another order: activations for a matrix whose own were sorted by group."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.kernels.registry import Arguments, Op


def _reference(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x [tokens, columns] to x[:, order], order int32 [columns] being each column's place in x."""
    return x.index_select(1, order.long())


def _shape(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], order.shape[0]))


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for tokens, columns in ((1, 1), (1, 33), (3, 96), (40, 70), (0, 5)):
        order = torch.randperm(columns, generator=generator).to(torch.int32)
        x = torch.randn(tokens, columns, generator=generator)
        yield x, order
        yield x.to(torch.bfloat16), order


take_columns = Op(
    name="take_columns",
    schema="(Tensor x, Tensor order) -> Tensor",
    reference=_reference,
    shape=_shape,
    cases=_cases,
    tolerance=0.0,
)
