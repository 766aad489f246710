"""GPTQ: columns are rounded one after another, and each rounding's error is taken up by the columns
that come after it, weighted by how inputs vary together (arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwenkit.quantize.grid import Grid, Rounded, find_grid, group_index, round_to

BLOCK_COLUMNS = 128
_WIDEST_IN_FP64 = 8192  # a wider factor in fp64 would not fit beside the rest
_MOST_DAMP = 1.0


@dataclass(frozen=True, slots=True)
class GptqResult:
    """`error` is the sum over rows of (w - q) H (w - q)ᵀ, with the damped H; `damp` what it took to
    factor H, which may be more than was asked for.
    """

    rounded: Rounded
    error: float
    damp: float


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, *, act_order: bool, damp: float
) -> GptqResult:
    """Round fp32 [rows, columns] by `hessian` fp32 [columns, columns].

    A column that no input reached is rounded to nearest. With `act_order` the columns that matter
    most come first and groups follow that order.
    """
    columns, size = weight.shape[1], grid.columns_of(weight)
    diagonal = hessian.diagonal()
    diagonal = torch.where(diagonal == 0, 1.0, diagonal)  # [columns]
    order = torch.arange(columns)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
        hessian, diagonal = hessian[order][:, order], diagonal[order]
    factor, damp = _inverse_factor(hessian, diagonal, damp)
    made = _Columns(weight.T[order].contiguous(), factor, grid, size)
    block = max(BLOCK_COLUMNS // size, 1) * size if size < BLOCK_COLUMNS else BLOCK_COLUMNS
    for start in range(0, columns, block):  # groups lie inside blocks, or blocks inside groups
        made.block(start, min(start + block, columns))
    back = order.argsort()
    rounded = Rounded(
        made.numbers[back].T.contiguous(),
        made.scales.T.contiguous(),
        made.zeros.T.to(torch.uint8).contiguous(),
        group_index(columns, size)[back],
        grid.bits,
    )
    return GptqResult(rounded, made.error, damp)


class _Columns:
    """A matrix on its way: a column of it is a row of `left`, which lies in one piece."""

    def __init__(self, left: torch.Tensor, factor: torch.Tensor, grid: Grid, size: int) -> None:
        self._left, self._factor, self._grid, self._size = left, factor, grid, size
        columns, rows = left.shape
        self.numbers = torch.empty_like(left, dtype=torch.uint8)  # [columns, rows]
        self.scales, self.zeros = torch.empty(2, columns // size, rows)
        self.error = 0.0

    def block(self, start: int, stop: int) -> None:
        """Round some columns; those after the last take up the errors of all of them at once."""
        left, factor, grid = self._left, self._factor, self._grid
        errors = torch.empty(stop - start, left.shape[1])
        for column in range(start, stop):
            group = column // self._size
            if column % self._size == 0:
                # of a group that reaches beyond the block, as far as errors have come
                span = left[column : column + self._size]
                self.scales[group], self.zeros[group] = find_grid(span.T, grid)
            scale, zero, now = self.scales[group], self.zeros[group], left[column]
            level = round_to(now, scale, zero, grid)
            self.numbers[column] = level.to(torch.uint8)
            off = (now - (level - zero) * scale) / factor[column, column]
            left[column:stop] -= factor[column, column:stop, None] * off
            errors[column - start] = off
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)  # makes no copy of it
        self.error += float(errors.square().sum())


def _inverse_factor(
    hessian: torch.Tensor, diagonal: torch.Tensor, damp: float
) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor of the inverse of a matrix with another diagonal [columns], damped,
    and the damping it took; fp32.

    With rows and columns in reverse the matrix is L Lᵀ, and that factor is L's inverse in reverse:
    half the work of a product's inverse and its factor.
    """
    dtype = torch.float64 if len(hessian) <= _WIDEST_IN_FP64 else torch.float32
    mean = diagonal.double().mean().item()
    while True:
        damped = hessian.flip(0, 1).to(dtype)
        damped.diagonal().copy_(diagonal.flip(0)).add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed or damp >= _MOST_DAMP:
            del damped
            _invert_lower(lower)
            return lower.flip(0, 1).float(), damp
        damp = min(damp * 10, _MOST_DAMP)


def _invert_lower(lower: torch.Tensor) -> None:
    """Invert a lower triangular matrix in its place, by halves: their products do most of it."""
    size = len(lower)
    if size <= BLOCK_COLUMNS:
        identity = torch.eye(size, dtype=lower.dtype)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    first, second = lower[:half, :half], lower[half:, half:]
    _invert_lower(first)
    _invert_lower(second)
    lower[half:, :half] = second @ lower[half:, :half] @ -first
