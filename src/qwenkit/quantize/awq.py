"""AWQ: channels that carry much are made larger before they are rounded, and what feeds them made
smaller by as much, so that their relative error shrinks (arXiv 2306.00978).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from qwenkit.quantize.grid import Grid
from qwenkit.quantize.ranges import Ranges

_RATIOS = (0.15, 0.3, 0.45, 0.65)
_SHARES = (0.4, 0.55, 0.7, 0.85, 1.0)
_POWER = 8  # of numbers that tell a group's range: a range is clipped, so the largest is not all
_BALANCE_STEPS = 60
_MOST_SCALE = 32.0  # of a channel beside its group's mean
_LEAST_READ = 1e-2  # of the mean: a channel that this text leaves silent may speak in another
_LEAST_GAIN = 1e-3  # for less nothing is scaled
_SEARCH_NUMBERS = 1 << 18  # that each trial rounds: of large matrices some rows stand for all
_FEWEST_ROWS = 128


def search_scales(
    weights: Sequence[torch.Tensor],
    mean_absolute: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """What to multiply the columns of matrices with that read the same inputs: fp32 [columns].

    `mean_absolute` [columns] is the mean of |x|, `hessian` [columns, columns] the sum of x xᵀ.
    Ones where nothing is better. Each trial is judged by what its clipped rounding loses: scales
    that are best for whole ranges are too large for clipped ones.
    """
    weight = torch.cat([_some_rows(each, len(weights)) for each in weights])  # [rows, columns]
    size = grid.columns_of(weight)
    best = torch.ones(weight.shape[1])
    least = _clipped_loss(weight, hessian, grid, best) * (1 - _LEAST_GAIN)
    for logs in _trials(weight, mean_absolute, hessian.diagonal(), size):
        grouped = logs.view(-1, size)
        scales = (grouped - grouped.mean(1, keepdim=True)).flatten().exp()
        loss = _clipped_loss(weight, hessian, grid, scales)
        if loss < least:
            best, least = scales, loss
    return best


def _clipped_loss(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, scales: torch.Tensor
) -> float:
    ranges = Ranges(weight * scales, hessian / scales / scales[:, None], grid)
    ranges.narrow()
    return ranges.loss


def _trials(
    weight: torch.Tensor, mean_absolute: torch.Tensor, squares: torch.Tensor, size: int
) -> Iterator[torch.Tensor]:
    """Logarithms of scales [columns]: powers of what channels carry, as AWQ's own, with and without
    the share that a channel's numbers have of their groups' largest; then what balances each group,
    and parts of the way to it.
    """
    rows, columns = weight.shape
    grouped = weight.abs().view(rows, columns // size, size)
    shares = grouped / (grouped.amax(2, keepdim=True) + 1e-6)
    read = _above_floor(mean_absolute, _LEAST_READ).log()
    share = _above_floor(shares.view(rows, columns).mean(0), _LEAST_READ).log()
    for ratio in _RATIOS:
        yield ratio * read
        yield ratio * (read - share)
    balanced = _balanced(grouped, _above_floor(squares, _LEAST_READ**2).view(-1, size))
    for part in _SHARES:
        yield part * balanced


def _balanced(grouped: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Logarithms of the scales [columns] with which groups are expected to lose least.

    A group with the range R of levels loses R² Σ h/s², of its channels' `squares` h [groups, size].
    R is taken for the norm of its scaled magnitudes `grouped` [rows, groups, size] of a high power.
    Where this is least, a channel's share of the sum is its share of the norm, in the mean over
    rows weighted by R².
    """
    logs = torch.zeros_like(squares)
    most = math.log(_MOST_SCALE)
    for _ in range(_BALANCE_STEPS):
        scaled = grouped * logs.exp()
        largest = scaled.amax(2, keepdim=True).clamp(min=1e-30)
        powers = (scaled / largest) ** _POWER
        norms = powers.sum(2, keepdim=True).clamp(min=1.0)
        weights = (largest * norms ** (1 / _POWER)).square()  # R² [rows, groups, 1]
        of_range = (powers / norms * weights).sum(0) / weights.sum(0).clamp(min=1e-30)
        lost = squares / (2 * logs).exp()
        lost = lost / lost.sum(1, keepdim=True)
        # a scale moves the first share with its square, the other one with its power
        step = (lost.clamp(min=1e-9) / of_range.clamp(min=1e-9)).log() / (_POWER + 2)
        logs = (logs + step.clamp(-0.3, 0.3)).clamp(-most, most)
        logs = logs - logs.mean(1, keepdim=True)
    return logs.flatten()


def _above_floor(numbers: torch.Tensor, part: float) -> torch.Tensor:
    """No less than a part of their mean; ones where all are zero."""
    mean = numbers.mean()
    return numbers.clamp(min=part * float(mean)) if mean > 0 else torch.ones_like(numbers)


def _some_rows(weight: torch.Tensor, parts: int) -> torch.Tensor:
    """All rows, or equally spaced ones where a trial with all would take long."""
    rows, columns = weight.shape
    most = max(_FEWEST_ROWS, _SEARCH_NUMBERS // (columns * parts))
    return weight if rows <= most else weight[:: -(-rows // most)]
