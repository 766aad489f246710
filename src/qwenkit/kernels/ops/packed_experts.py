"""Tokens sorted by expert times packed matrices of experts, all in one call."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.kernels.ops.grouped_matmul import segments
from qwenkit.kernels.ops.packed_gated import packed_gated
from qwenkit.kernels.ops.packed_matmul import PACKED_SETTINGS, packed_matmul
from qwenkit.kernels.packed import PANEL_ROWS
from qwenkit.kernels.registry import Arguments, Op


def _reference(
    x: torch.Tensor,
    order: torch.Tensor | None,
    ends: torch.Tensor,
    data: list[torch.Tensor],
    scales: list[torch.Tensor],
    mins: list[torch.Tensor],
    kind: str,
    rows: int,
    zero_point: int,
) -> torch.Tensor:
    """x_e W_eᵀ for every expert e, or silu(x_e G_eᵀ) · x_e U_eᵀ of two matrices: [choices, rows].

    x_e are the rows of x[order] (of x where there is no order) from ends[e - 1] to ends[e]. Each
    matrix has the experts' below each other, `rows` of each, a multiple of 16; the lists are as in
    the op packed_gated. An expert without rows is not read.
    """
    x = x if order is None else x.index_select(0, order)
    y = x.new_empty((len(x), rows))
    panels = rows // PANEL_ROWS
    for expert, start, stop in segments(ends):
        own = slice(expert * panels, (expert + 1) * panels)
        parts = [[t[own] for t in tensors] for tensors in (data, scales, mins)]
        if len(data) == 2:
            given = x[start:stop], None, 0.0, *parts, kind, rows, zero_point
            y[start:stop] = packed_gated.reference(*given)
        else:
            first = [each[0] if each else None for each in parts]
            given = x[start:stop], *first, None, None, kind, rows, zero_point, False
            y[start:stop] = packed_matmul.reference(*given)
    return y


def _shape(
    x: torch.Tensor,
    order: torch.Tensor | None,
    ends: torch.Tensor,
    data: list[torch.Tensor],
    scales: list[torch.Tensor],
    mins: list[torch.Tensor],
    kind: str,
    rows: int,
    zero_point: int,
) -> torch.Tensor:
    return x.new_empty((len(x if order is None else order), rows))


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    every = torch.tensor([1, 1, 4, 21])  # the second has no rows
    for setting in PACKED_SETTINGS:
        columns = setting.columns(2)
        matrices = [setting.matrix(4 * 32, columns, generator) for _ in range(2)]
        x = torch.randn(6, columns, generator=generator) + 0.5
        order = torch.randint(0, 6, (21,), generator=generator)
        for count in (1, 2):
            lists = (
                [m.data for m in matrices[:count]],
                [m.scales for m in matrices[:count] if m.scales is not None],
                [m.mins for m in matrices[:count] if m.mins is not None],
            )
            how = setting.kind, 32, matrices[0].zero_point
            yield x, order, every, *lists, *how
            yield x[:1], None, torch.tensor([0, 0, 1, 1]), *lists, *how
            yield x[:0], order[:0], torch.zeros_like(every), *lists, *how


packed_experts = Op(
    name="packed_experts",
    schema="(Tensor x, Tensor? order, Tensor ends, Tensor[] data, Tensor[] scales, Tensor[] mins, "
    "str kind, int rows, int zero_point) -> Tensor",
    reference=_reference,
    shape=_shape,
    cases=_cases,
    tolerance=4e-2,  # the error of one product of rounded activations times the other's
)
