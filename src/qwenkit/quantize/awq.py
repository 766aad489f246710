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
_END_STEPS = (2, 1, -1, 2, 1)  # of one end, from where the range is by then
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


def round_clipped(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> Rounded:
    """Round fp32 [rows, columns] to nearest within each group's best range, as far as the group's
    own inputs tell.
    """
    size = grid.columns_of(weight)
    parts = [
        _clipped(weight[start : start + _ROWS_AT_ONCE], hessian, grid, size)
        for start in range(0, len(weight), _ROWS_AT_ONCE)
    ]
    numbers, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return Rounded(numbers, scales, zeros, group_index(weight.shape[1], size), grid.bits)


def _clipped(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers, scales and zero points of some rows."""
    rows, columns = weight.shape
    grouped = weight.view(rows, columns // size, size).transpose(0, 1)  # [groups, rows, size]
    blocks = [hessian[i : i + size, i : i + size] for i in range(0, columns, size)]
    ranges = _Ranges(grouped, torch.stack(blocks), grid)
    ranges.narrow()
    return (
        ranges.numbers.transpose(0, 1).reshape(rows, columns),
        ranges.scales.T.contiguous(),
        ranges.zeros.T.contiguous(),
    )


class _Ranges:
    """For every group of every row the best range so far, and what it rounds to.

    `grouped` is fp32 [groups, rows, size]; `blocks` [groups, size, size] are the sums of what each
    group reads.
    """

    def __init__(self, grouped: torch.Tensor, blocks: torch.Tensor, grid: Grid) -> None:
        self._grouped, self._blocks, self._grid = grouped, blocks, grid
        self._low, self._high = grouped.amin(2), grouped.amax(2)  # [groups, rows]
        self.numbers, self.scales, self.zeros, self._loss = self._round(self._low, self._high)

    def narrow(self) -> None:
        """Try ranges down to half of the largest magnitude, then each end by itself."""
        most = torch.maximum(-self._low, self._high)
        low, high = self._low.clone(), self._high.clone()
        for step in range(1, _MOST_CLIPPED + 1):
            bound = most * (1 - step / _CLIP_STEPS)
            self._try(torch.maximum(low, -bound), torch.minimum(high, bound))
        if self._grid.symmetric:
            return
        for step in _END_STEPS:
            self._try(self._low * (1 - step / _CLIP_STEPS), self._high)
            self._try(self._low, self._high * (1 - step / _CLIP_STEPS))

    def _round(
        self, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Numbers, scales and zero points within ranges, and what they lose."""
        ends = torch.stack((low, high), -1)
        scales, zeros = find_grid(ends, self._grid)
        numbers = round_to(self._grouped, scales[..., None], zeros[..., None], self._grid)
        off = (numbers - zeros[..., None]) * scales[..., None] - self._grouped
        loss = ((off @ self._blocks) * off).sum(2)  # [groups, rows]
        return numbers.to(torch.uint8), scales, zeros.to(torch.uint8), loss

    def _try(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Take over the ranges that lose less."""
        numbers, scales, zeros, loss = self._round(low, high)
        better = loss < self._loss
        self.numbers = torch.where(better[..., None], numbers, self.numbers)
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)
        self._low = torch.where(better, low, self._low)
        self._high = torch.where(better, high, self._high)
        self._loss = torch.where(better, loss, self._loss)


def _some_rows(weight: torch.Tensor, parts: int) -> torch.Tensor:
    """All rows, or equally spaced ones where a trial with all would take long."""
    rows, columns = weight.shape
    most = max(256, _SEARCH_NUMBERS // (columns * columns * parts))
    return weight if rows <= most else weight[:: -(-rows // most)]
