"""Activations, normalised on request, times a gate and what it gates: the first half of SwiGLU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.kernels.ops.packed_matmul import PACKED_SETTINGS
from qwenkit.kernels.ops.packed_projections import packed_projections
from qwenkit.kernels.ops.silu_mul import silu_mul
from qwenkit.kernels.registry import Arguments, Op


def _reference(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    epsilon: float,
    data: list[torch.Tensor],
    scales: list[torch.Tensor],
    mins: list[torch.Tensor],
    kind: str,
    rows: int,
    zero_point: int,
) -> torch.Tensor:
    """silu(n(x) Gᵀ) · n(x) Uᵀ of two matrices G and U, [tokens, rows] in x's dtype; the rest as in
    the op packed_projections.
    """
    gate, up = packed_projections.reference(
        *(x, norm, epsilon, data, scales, mins, []),
        *(kind, [rows, rows], zero_point, [False, False]),
    )
    return silu_mul.reference(gate, up)  # type: ignore[no-any-return]


def _shape(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    epsilon: float,
    data: list[torch.Tensor],
    scales: list[torch.Tensor],
    mins: list[torch.Tensor],
    kind: str,
    rows: int,
    zero_point: int,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], rows))


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for setting in PACKED_SETTINGS:
        for tokens, rows, groups in ((1, 16, 1), (3, 40, 3), (21, 33, 2)):
            columns = setting.columns(groups)
            matrices = [setting.matrix(rows, columns, generator) for _ in range(2)]
            x = torch.randn(tokens, columns, generator=generator) + 0.5
            norm = torch.rand(columns, generator=generator) + 0.5
            lists = (
                [m.data for m in matrices],
                [m.scales for m in matrices if m.scales is not None],
                [m.mins for m in matrices if m.mins is not None],
            )
            how = setting.kind, rows, matrices[0].zero_point
            yield x, norm, 1e-6, *lists, *how
            yield x * 30, None, 0.0, *lists, *how
        yield x[:0], norm, 1e-6, *lists, *how


packed_gated = Op(
    name="packed_gated",
    schema="(Tensor x, Tensor? norm, float epsilon, Tensor[] data, Tensor[] scales, Tensor[] mins, "
    "str kind, int rows, int zero_point) -> Tensor",
    reference=_reference,
    shape=_shape,
    cases=_cases,
    tolerance=4e-2,  # the error of one product of rounded activations times the other's
)
