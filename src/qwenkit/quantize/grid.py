"""Whole numbers with a scale and a zero point for every group of columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwenkit.errors import NonFiniteError

_SMALLEST = 2.0**-24  # of fp16


@dataclass(frozen=True, slots=True)
class Grid:
    """What levels a matrix's numbers may have: 2^bits of them, a scale for every `group_size`
    columns (-1: for the whole row). With `symmetric` zero is in the middle; else every group has a
    zero point.
    """

    bits: int
    group_size: int
    symmetric: bool

    @property
    def top(self) -> int:
        """The highest level."""
        return (1 << self.bits) - 1

    def columns_of(self, weight: torch.Tensor) -> int:
        """Columns of a group in a matrix [rows, columns]."""
        return weight.shape[1] if self.group_size == -1 else self.group_size


@dataclass(frozen=True, slots=True)
class Rounded:
    """A matrix in whole numbers: `numbers` uint8 [rows, columns] below 2^bits, `scales` fp32 that
    fp16 has and `zero_points` uint8, both [rows, groups], `groups` int64 [columns].
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    groups: torch.Tensor
    bits: int

    def dequantize(self) -> torch.Tensor:
        """fp32 [rows, columns]"""
        numbers = self.numbers.float()
        numbers -= self.zero_points.float()[:, self.groups]
        return numbers.mul_(self.scales[:, self.groups])

    def rows(self, start: int, stop: int) -> Rounded:
        """The same of some rows."""
        part = slice(start, stop)
        return Rounded(
            self.numbers[part], self.scales[part], self.zero_points[part], self.groups, self.bits
        )


def find_grid(grouped: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points, both fp32 [...], that reach the extremes of fp32 [..., columns].

    Scales are numbers of fp16, as files keep them. Raises NonFiniteError where one does not fit.
    """
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scales = ((high - low) / grid.top).half().float()
    if not bool(torch.isfinite(scales).all()):
        raise NonFiniteError("the weight has numbers too large for a scale in fp16.")
    scales = torch.where(scales == 0, torch.where(high > low, _SMALLEST, 1.0), scales)
    if grid.symmetric:
        return scales, torch.full_like(scales, (grid.top + 1) / 2)
    return scales, (-low / scales).round_().clamp_(0, grid.top)


def round_to(
    numbers: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """The nearest levels, fp32 whole numbers of the shape of `numbers`, which the others fit."""
    return (numbers / scales).round_().add_(zero_points).clamp_(0, grid.top)


def group_index(columns: int, group_size: int) -> torch.Tensor:
    """The group of each column, in order: int64 [columns]."""
    return torch.arange(columns) // group_size


def round_to_nearest(weight: torch.Tensor, grid: Grid) -> Rounded:
    """Each number of fp32 [rows, columns] to its nearest level: no data is needed."""
    rows, columns = weight.shape
    size = grid.columns_of(weight)
    grouped = weight.view(rows, columns // size, size)
    scales, zeros = find_grid(grouped, grid)
    numbers = round_to(grouped, scales[..., None], zeros[..., None], grid)
    return Rounded(
        numbers.view(rows, columns).to(torch.uint8),
        scales,
        zeros.to(torch.uint8),
        group_index(columns, size),
        grid.bits,
    )
