"""What range of numbers the levels of each group reach: as far as its extremes, or less where that
loses less than it gains.

The errors of a matrix's outputs are measured through the sums of its inputs, not by running it.
"""

from __future__ import annotations

import torch

from qwenkit.quantize.grid import Grid, Rounded, find_grid, group_index, round_to

_CLIP_STEPS = 20
_MOST_CLIPPED = 10  # of the steps: at most half of a range
_END_STEPS = (2, 1, -1, 2, 1)  # of one end, from where the range is by then
_SWEEPS = 2
_ROWS_AT_ONCE = 2048


def round_clipped(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> Rounded:
    """Round fp32 [rows, columns] to nearest within each group's best range, by `hessian` fp32
    [columns, columns], the sum of x xᵀ.
    """
    columns, size = weight.shape[1], grid.columns_of(weight)
    parts = []
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        ranges = Ranges(weight[start : start + _ROWS_AT_ONCE], hessian, grid)
        ranges.narrow()
        ranges.settle(hessian)
        parts.append(
            (
                ranges.numbers.transpose(0, 1).flatten(1),
                ranges.scales.T.contiguous(),
                ranges.zeros.T.contiguous(),
            )
        )
    numbers, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return Rounded(numbers, scales, zeros, group_index(columns, size), grid.bits)


class Ranges:
    """For every group of every row of fp32 [rows, columns] the best range so far, and what it
    rounds to: `numbers` uint8 [groups, rows, size], `scales` fp32 and `zeros` uint8 [groups, rows].
    """

    def __init__(self, weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> None:
        rows, columns = weight.shape
        self._grid, self._size = grid, grid.columns_of(weight)
        self._grouped = weight.view(rows, columns // self._size, self._size).transpose(0, 1)
        spans = [slice(i, i + self._size) for i in range(0, columns, self._size)]
        self._blocks = torch.stack([hessian[span, span] for span in spans])  # [groups, size, size]
        self._least, self._most = self._grouped.amin(2), self._grouped.amax(2)  # [groups, rows]
        self._low, self._high = self._least.clone(), self._most.clone()
        self.numbers, self.scales, self.zeros, self._loss = self._round(
            slice(None), self._low, self._high, None
        )

    @property
    def loss(self) -> float:
        """What all groups lose, each by itself, as `narrow` measures it."""
        return float(self._loss.sum(dtype=torch.float64))

    def narrow(self) -> None:
        """Try ranges down to half of the largest magnitude, then each end by itself, as far as each
        group's own inputs tell.
        """
        largest, every = torch.maximum(-self._least, self._most), slice(None)
        for step in range(1, _MOST_CLIPPED + 1):
            bound = largest * (1 - step / _CLIP_STEPS)
            low, high = torch.maximum(self._least, -bound), torch.minimum(self._most, bound)
            self._try(every, low, high)
        if self._grid.symmetric:
            return
        for step in _END_STEPS:
            self._try(every, self._low * (1 - step / _CLIP_STEPS), self._high)
            self._try(every, self._low, self._high * (1 - step / _CLIP_STEPS))

    def settle(self, hessian: torch.Tensor) -> None:
        """Choose again, one group after another, knowing what all others are off by: inputs vary
        together, so that a group can make up for a part of it.
        """
        off = self._off(slice(None)).transpose(0, 1).flatten(1)  # [rows, columns]
        for _ in range(_SWEEPS):
            for group, block in enumerate(self._blocks):
                span = slice(group * self._size, (group + 1) * self._size)
                others = off @ hessian[:, span] - off[:, span] @ block  # [rows, size]
                own = slice(group, group + 1)
                self._loss[own] = _lost(off[:, span][None], block[None], others)
                self._ends(own, others)
                off[:, span] = self._off(own)[0]

    def _ends(self, groups: slice, others: torch.Tensor) -> None:
        """Try all ends of the ranges of some groups: first the lower, then the upper ones."""
        least, most = self._least[groups], self._most[groups]
        parts = [1 - step / _CLIP_STEPS for step in range(_MOST_CLIPPED + 1)]
        if self._grid.symmetric:
            for part in parts:
                self._try(groups, least * part, most * part, others)
            return
        for part in parts:
            self._try(groups, least * part, self._high[groups], others)
        for part in parts:
            self._try(groups, self._low[groups], most * part, others)

    def _off(self, groups: slice) -> torch.Tensor:
        """What the numbers of some groups are off by, fp32 [groups, rows, size]."""
        levels = self.numbers[groups].float() - self.zeros[groups, :, None].float()
        return levels * self.scales[groups, :, None] - self._grouped[groups]

    def _round(
        self, groups: slice, low: torch.Tensor, high: torch.Tensor, others: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Numbers, scales and zero points within ranges, and what they lose."""
        scales, zeros = find_grid(torch.stack((low, high), -1), self._grid)
        grouped = self._grouped[groups]
        numbers = round_to(grouped, scales[..., None], zeros[..., None], self._grid)
        off = (numbers - zeros[..., None]) * scales[..., None] - grouped
        loss = _lost(off, self._blocks[groups], others)
        return numbers.to(torch.uint8), scales, zeros.to(torch.uint8), loss

    def _try(
        self,
        groups: slice,
        low: torch.Tensor,
        high: torch.Tensor,
        others: torch.Tensor | None = None,
    ) -> None:
        """Take over the ranges that lose less."""
        numbers, scales, zeros, loss = self._round(groups, low, high, others)
        better = loss < self._loss[groups]
        for own, found in (
            (self.scales, scales),
            (self.zeros, zeros),
            (self._low, low),
            (self._high, high),
            (self._loss, loss),
        ):
            own[groups] = torch.where(better, found, own[groups])
        self.numbers[groups] = torch.where(better[..., None], numbers, self.numbers[groups])


def _lost(off: torch.Tensor, blocks: torch.Tensor, others: torch.Tensor | None) -> torch.Tensor:
    """What each group of each row loses, [groups, rows], being `off` [groups, rows, size]; `blocks`
    [groups, size, size] are the sums of what it reads, `others` [rows, size] the sums of that with
    the errors of all other groups.
    """
    pull = off @ blocks
    if others is not None:
        pull += 2 * others
    return (pull * off).sum(2)
