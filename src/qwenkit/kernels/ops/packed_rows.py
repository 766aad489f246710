"""Rows of a packed matrix as numbers: what an embedding looks up."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels.ops.packed_matmul import PACKED_SETTINGS
from qwenkit.kernels.packed import PANEL_ROWS, Packed, unpack
from qwenkit.kernels.registry import Arguments, Op


def _reference(
    ids: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    mins: torch.Tensor | None,
    kind: str,
    rows: int,
    columns: int,
    zero_point: int,
) -> torch.Tensor:
    """ids int64 [tokens] to fp32 [tokens, columns]; the matrix as `kernels.packed.Packed` has it.

    Raises KernelError for an id out of range.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise KernelError(f"packed_rows: ids must be from 0 to {rows - 1}.")
    panels, inverse = torch.unique(ids // PANEL_ROWS, return_inverse=True)
    few = Packed(
        kind,
        len(panels) * PANEL_ROWS,
        columns,
        data[panels],
        None if scales is None else scales[panels],
        None if mins is None else mins[panels],
        zero_point,
    )
    return unpack(few, torch.float32)[inverse * PANEL_ROWS + ids % PANEL_ROWS]


def _shape(
    ids: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    mins: torch.Tensor | None,
    kind: str,
    rows: int,
    columns: int,
    zero_point: int,
) -> torch.Tensor:
    return torch.empty((ids.shape[0], columns), device=ids.device)


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for setting in PACKED_SETTINGS:
        columns = setting.columns(3)
        matrix = setting.matrix(50, columns, generator)
        tensors = matrix.data, matrix.scales, matrix.mins
        for ids in ([*range(50)], [49, 0, 17, 17, 33], []):
            wanted = torch.tensor(ids, dtype=torch.int64)
            yield wanted, *tensors, setting.kind, 50, columns, matrix.zero_point


packed_rows = Op(
    name="packed_rows",
    schema="(Tensor ids, Tensor data, Tensor? scales, Tensor? mins, str kind, int rows, "
    "int columns, int zero_point) -> Tensor",
    reference=_reference,
    shape=_shape,
    cases=_cases,
    tolerance=0.0,
)
