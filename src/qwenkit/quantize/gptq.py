"""GPTQ: columns are rounded one after another, and each rounding's error is taken up by the columns
that come after it, weighted by how inputs vary together (arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwenkit.quantize.grid import Rounded, find_grid, group_index, round_to

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
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    act_order: bool,
    damp: float,
    least_zero: int,
) -> GptqResult:
    """Round fp32 [rows, columns] by `hessian` fp32 [columns, columns], which is changed.

    A column that no input reached is rounded to nearest. With `act_order` the columns that matter
    most come first and groups follow that order.
    """
    columns = weight.shape[1]
    size = columns if group_size == -1 else group_size
    unseen = hessian.diagonal() == 0
    hessian.diagonal()[unseen] = 1.0
    order = torch.arange(columns)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        hessian = hessian[order][:, order]
    factor, damp = _inverse_factor(hessian, damp)
    del hessian
    # [columns, rows]: a column of the matrix lies in one piece
    left = weight.T[order].contiguous()
    numbers = torch.empty_like(left, dtype=torch.uint8)
    groups = columns // size
    scales, zeros = torch.empty(2, groups, weight.shape[0])
    error = 0.0
    # Groups are found inside blocks, or blocks inside groups.
    block = max(BLOCK_COLUMNS // size, 1) * size if size < BLOCK_COLUMNS else BLOCK_COLUMNS
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty(stop - start, weight.shape[0])
        for column in range(start, stop):
            group = column // size
            if column % size == 0:
                # of a group that reaches beyond the block, as far as errors have come
                span = left[column : column + size]
                scales[group], zeros[group] = find_grid(
                    span.T, bits, symmetric=symmetric, least_zero=least_zero
                )
            now = left[column]
            level = round_to(now, scales[group], zeros[group], bits)
            numbers[column] = level.to(torch.uint8)
            off = (now - (level - zeros[group]) * scales[group]) / factor[column, column]
            left[column:stop] -= factor[column, column:stop, None] * off
            errors[column - start] = off
        left[stop:] -= factor[start:stop, stop:].T @ errors
        error += float(errors.square().sum())
    back = order.argsort()
    rounded = Rounded(
        numbers[back].T.contiguous(),
        scales.T.contiguous(),
        zeros.T.to(torch.uint8).contiguous(),
        group_index(columns, group_size)[back],
        bits,
    )
    return GptqResult(rounded, error, damp)


def _inverse_factor(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor of the damped matrix's inverse, fp32, and the damping it took."""
    dtype = torch.float64 if len(hessian) <= _WIDEST_IN_FP64 else torch.float32
    mean = hessian.diagonal().double().mean().item()
    while True:
        damped = hessian.to(dtype, copy=True)
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed or damp >= _MOST_DAMP:
            return upper.float(), damp
        damp = min(damp * 10, _MOST_DAMP)
