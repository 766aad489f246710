"""AWQ: channels that carry much are made larger before they are rounded, and what feeds them made
smaller by as much, so that their relative error shrinks (arXiv 2306.00978); then each group's range
is clipped where that loses less than it gains.

The errors of a matrix's outputs are measured through the sums of its inputs, not by running it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwenkit.quantize.grid import Grid, Rounded, find_grid, group_index, round_to, round_to_nearest

_RATIOS = 20
_CLIP_STEPS = 20
_MOST_CLIPPED = 10  # of the steps: at most half of a range
_LEAST_SCALE = 1e-4
_SEARCH_NUMBERS = 1 << 34  # products of a search's trial: of wide matrices some rows stand for all
_ROWS_AT_ONCE = 2048


def search_scales(
    weights: Sequence[torch.Tensor],
    mean_absolute: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """What to multiply the columns of matrices with that read the same inputs: fp32 [columns].

    `mean_absolute` [columns] is the mean of |x|, `hessian` [columns, columns] the sum of x xᵀ.
    Ones where nothing is better.
    """
    weight = torch.cat([_some_rows(each, len(weights)) for each in weights])  # [rows, columns]
    rows, columns = weight.shape
    size = grid.columns_of(weight)
    grouped = weight.abs().view(rows, columns // size, size)
    shares = grouped / (grouped.amax(2, keepdim=True) + 1e-6)
    weight_mean = shares.view(rows, columns).mean(0)
    best, least = torch.ones(columns), torch.inf
    for step in range(-1, _RATIOS):
        ratio = step / _RATIOS
        scales = torch.ones(columns)  # first without any
        if step >= 0:
            scales = mean_absolute**ratio / (weight_mean ** (1 - ratio) + _LEAST_SCALE)
            scales = scales.clamp(min=_LEAST_SCALE)
            scales = scales / (scales.max() * scales.min()).sqrt()
        rounded = round_to_nearest(weight * scales, grid)
        off = rounded.dequantize() / scales - weight
        loss = float(((off @ hessian) * off).sum())
        if loss < least:
            best, least = scales, loss
    return best


def round_clipped(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, *, clip: bool
) -> Rounded:
    """Round fp32 [rows, columns] to nearest within each group's best range, as far as the group's
    own inputs tell; the whole range without `clip`.
    """
    steps, size = _MOST_CLIPPED if clip else 1, grid.columns_of(weight)
    parts = [
        _clipped(weight[start : start + _ROWS_AT_ONCE], hessian, grid, size, steps)
        for start in range(0, len(weight), _ROWS_AT_ONCE)
    ]
    numbers, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return Rounded(numbers, scales, zeros, group_index(weight.shape[1], size), grid.bits)


def _clipped(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, size: int, steps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    groups = columns // size
    grouped = weight.view(rows, groups, size).transpose(0, 1)  # [groups, rows, size]
    blocks = torch.stack(
        [hessian[i : i + size, i : i + size] for i in range(0, columns, size)]
    )  # [groups, size, size]
    most = grouped.abs().amax(2, keepdim=True)
    best = torch.full((groups, rows), torch.inf)
    kept: tuple[torch.Tensor, ...] = ()
    for step in range(steps):
        bound = most * (1 - step / _CLIP_STEPS)
        inside = torch.maximum(torch.minimum(grouped, bound), -bound)
        scales, zeros = find_grid(inside, grid)
        numbers = round_to(inside, scales[..., None], zeros[..., None], grid)
        off = (numbers - zeros[..., None]) * scales[..., None] - grouped
        loss = ((off @ blocks) * off).sum(2)  # [groups, rows]
        found = (numbers.to(torch.uint8), scales, zeros.to(torch.uint8))
        if not kept:
            kept, best = found, loss
            continue
        better = loss < best
        best = torch.where(better, loss, best)
        pairs = zip(found, kept, strict=True)
        kept = tuple(
            torch.where(better[..., None] if new.dim() == 3 else better, new, old)
            for new, old in pairs
        )
    numbers, scales, zeros = kept
    return (
        numbers.transpose(0, 1).reshape(rows, columns),
        scales.T.contiguous(),
        zeros.T.contiguous(),
    )


def _some_rows(weight: torch.Tensor, parts: int) -> torch.Tensor:
    """All rows, or equally spaced ones where a trial with all would take long."""
    rows, columns = weight.shape
    most = max(256, _SEARCH_NUMBERS // (columns * columns * parts))
    return weight if rows <= most else weight[:: -(-rows // most)]
