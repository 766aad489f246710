"""Activations, normalised on request, times several packed matrices: queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.kernels.ops.packed_matmul import PACKED_SETTINGS, packed_matmul
from qwenkit.kernels.ops.rms_norm import rms_norm
from qwenkit.kernels.registry import Arguments, Op


def _reference(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    epsilon: float,
    data: list[torch.Tensor],
    scales: list[torch.Tensor],
    mins: list[torch.Tensor],
    biases: list[torch.Tensor],
    kind: str,
    rows: list[int],
    zero_point: int,
    precise: list[bool],
) -> list[torch.Tensor]:
    """n(x) Wᵀ + bias for each matrix W of the lists, which are as in the op packed_matmul, or empty
    where no matrix has such a thing. n is `rms_norm` with the weights `norm`, or nothing.

    x [tokens, columns] to a list of [tokens, rows of the matrix], in x's dtype.
    """
    x = x if norm is None else rms_norm.reference(x, norm, epsilon)
    return [
        packed_matmul.reference(
            x,
            data[i],
            scales[i] if scales else None,
            mins[i] if mins else None,
            biases[i] if biases else None,
            None,
            *(kind, rows[i], zero_point, precise[i]),
        )
        for i in range(len(data))
    ]


def _shape(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    epsilon: float,
    data: list[torch.Tensor],
    scales: list[torch.Tensor],
    mins: list[torch.Tensor],
    biases: list[torch.Tensor],
    kind: str,
    rows: list[int],
    zero_point: int,
    precise: list[bool],
) -> list[torch.Tensor]:
    return [x.new_empty((x.shape[0], count)) for count in rows]


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for setting in PACKED_SETTINGS:
        for tokens, rows, groups in ((1, (16, 3), 1), (3, (40, 16, 17), 3), (21, (33, 8, 8), 2)):
            columns = setting.columns(groups)
            matrices = [setting.matrix(count, columns, generator) for count in rows]
            x = torch.randn(tokens, columns, generator=generator) + 0.5
            outliers = x.clone()
            outliers[:, columns // 2] = 1e3
            norm = torch.rand(columns, generator=generator) + 0.5
            biases = [torch.randn(count, generator=generator) for count in rows]
            lists = (
                [m.data for m in matrices],
                [m.scales for m in matrices if m.scales is not None],
                [m.mins for m in matrices if m.mins is not None],
            )
            how = (
                setting.kind,
                list(rows),
                matrices[0].zero_point,
                [False, *[True] * (len(rows) - 1)],
            )
            yield x, norm, 1e-6, *lists, biases, *how
            yield outliers, norm, 1e-6, *lists, [], *how
            yield outliers, None, 0.0, *lists, biases, *how
        yield x[:0], norm, 1e-6, *lists, [], *how


packed_projections = Op(
    name="packed_projections",
    schema="(Tensor x, Tensor? norm, float epsilon, Tensor[] data, Tensor[] scales, Tensor[] mins, "
    "Tensor[] biases, str kind, int[] rows, int zero_point, bool[] precise) -> Tensor[]",
    reference=_reference,
    shape=_shape,
    cases=_cases,
    tolerance=2e-2,  # a backend may round activations to eight bits per group of columns
)
