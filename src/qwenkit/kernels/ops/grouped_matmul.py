"""Rows sorted by group, each times the transposed matrix of its group: the experts of a mixture.

The matrices stand below each other in one weight, so that a backend can run any product of plain
rows on a range of them. Groups without rows are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch.nn import functional

from qwenkit.errors import KernelError
from qwenkit.kernels.registry import Arguments, Op


def segments(ends: torch.Tensor) -> list[tuple[int, int, int]]:
    """(group, start, stop) of every group that has rows; `ends` [groups] as in the op."""
    bounds = pairwise([0, *ends.tolist()])
    return [(group, start, stop) for group, (start, stop) in enumerate(bounds) if stop > start]


def _reference(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x [rows, columns], weight [groups * out_rows, columns], ends [groups] to [rows, out_rows].

    The rows of group g are those from ends[g - 1] (0 for the first) up to ends[g], and the last
    end is the number of rows.
    """
    _out_rows(x, weight, ends)
    matrices = weight.view(ends.numel(), -1, weight.shape[1]).unbind(0)  # each [out_rows, columns]
    pieces = [functional.linear(x[a:b], matrices[group]) for group, a, b in segments(ends)]
    return torch.cat(pieces) if pieces else _shape(x, weight, ends)


def _shape(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], _out_rows(x, weight, ends)))


def _out_rows(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> int:
    groups = ends.shape[0]
    if weight.shape[0] % groups or weight.shape[1] != x.shape[1]:
        raise KernelError(
            f"grouped_matmul: x {list(x.shape)} and {groups} groups do not go with a weight "
            f"{list(weight.shape)}, which must be [groups * out_rows, columns]."
        )
    return weight.shape[0] // groups


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    every = torch.tensor([2, 3, 3, 8])  # the third group has no rows
    for groups, out_rows, columns, ends in (
        (1, 1, 1, torch.tensor([1])),
        (4, 7, 5, every),
        (4, 16, 33, torch.tensor([0, 0, 0, 3])),
        (4, 48, 64, torch.tensor([9, 9, 9, 9])),
        (64, 16, 32, torch.arange(64).div(8, rounding_mode="floor") + 1),  # eight of 64 active
    ):
        weight = torch.randn(groups * out_rows, columns, generator=generator)
        x = torch.randn(int(ends[-1]), columns, generator=generator)
        yield x, weight, ends
        yield x.to(torch.bfloat16), weight.to(torch.bfloat16), ends
    outliers = x.clone()
    outliers[:, 3] = 1e4  # of Qwen's size
    yield outliers, weight, ends
    yield torch.zeros_like(x), weight, ends
    yield x[:0], weight, torch.zeros_like(ends)


grouped_matmul = Op(
    name="grouped_matmul",
    schema="(Tensor x, Tensor weight, Tensor ends) -> Tensor",
    reference=_reference,
    shape=_shape,
    cases=_cases,
    tolerance=1e-2,  # of bf16 cases; a backend sums in an order of its own
)
