"""The searches for scales behind GGML's quantizers, giving the very bits that llama.cpp's give.

A search looks at many groups of numbers at once: x is fp32 [width, groups], a column a group, so
that each step of a sum along the width is one operation over all groups. Sums add in the order of
the width, every product and sum is rounded by itself, and where ggml-quants.c takes the first of
equal numbers so is it here: its C code, which is compiled without fused operations, rounds in the
same places. The algorithms are that file's (MIT licence); the code is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from qwenkit.kernels.blocks import IQ4_NL_LEVELS

_NO_GROUP = 1e-15  # a group whose largest magnitude is below this counts as zeros
_REFINEMENTS = 5
_ROUNDER = 12582912.0  # 1.5 · 2²³: adding it leaves the nearest whole number in the lowest bits


@dataclass(frozen=True, slots=True)
class Found:
    """The best scale of each group [groups] and the codes [width, groups] it was found with, both
    fp32; `low` [groups] is what the code 0 stands for, where a search looks for it.
    """

    scale: torch.Tensor
    codes: torch.Tensor
    low: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Importance:
    """How much an error counts in each column of blocks [blocks, columns], fp32, and of each block
    the mean square [blocks] of the row that it belongs to.
    """

    columns: torch.Tensor
    row_means: torch.Tensor

    def by_row(self, x: torch.Tensor) -> torch.Tensor:
        """The weights of x [columns, blocks] where numbers are taken in relation to their row."""
        return self.by_group(x, self.row_means)

    def by_group(self, x: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """Importance · √(mean square + x²) of x [width, groups], the groups of a block following
        each other; `means` [blocks].
        """
        means = means.repeat_interleave(x.shape[1] // len(means))
        return self.of_groups(len(x)) * root(means + x * x)

    def of_groups(self, width: int) -> torch.Tensor:
        """The importance of numbers that lie [width, groups]."""
        return self.columns.view(-1, width).t().contiguous()


def by_group(x: torch.Tensor, width: int) -> torch.Tensor:
    """[blocks, 256] to [width, groups of all blocks]."""
    return x.view(-1, width).t().contiguous()


def by_block(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """What belongs to groups, [groups of all blocks], to [groups of a block, blocks]."""
    return x.view(blocks, -1).t().contiguous()


def block_squares(x: torch.Tensor) -> torch.Tensor:
    """The sum of squares of each block of x [blocks, 256]."""
    flat = x.t().contiguous()  # [256, blocks]
    return in_turn(flat * flat)


def nearest(x: torch.Tensor) -> torch.Tensor:
    """The nearest whole number, ties to even, as fp32. Beyond ±2²² what adding a large number
    leaves in the lowest bits, as in C.
    """
    bits = (x + _ROUNDER).contiguous().view(torch.int32)
    return bits.bitwise_and_(0x7FFFFF).sub_(0x400000).to(torch.float32)


def in_turn(terms: torch.Tensor) -> torch.Tensor:
    """The sum along the first dimension, one term after another from zero on."""
    total = terms[0] + 0.0
    for term in terms[1:]:
        total += term
    return total


def over(number: float, x: torch.Tensor) -> torch.Tensor:
    """number / x rounded once; Python's operator would multiply by a reciprocal."""
    return torch.full_like(x, number).div_(x)


def root(x: torch.Tensor) -> torch.Tensor:
    """√x rounded once; torch's own of fp32 is one bit off for every fifth number."""
    return x.double().sqrt_().float()


def ratio(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x / y, and 0 where y is 0."""
    return torch.where(y != 0, x / y, 0.0)


def first_extreme(x: torch.Tensor) -> torch.Tensor:
    """Of each group the first of the numbers that are furthest from zero, [groups]; never -0."""
    return x.gather(0, x.abs().argmax(0, keepdim=True))[0] + 0.0


def first_lowest(x: torch.Tensor) -> torch.Tensor:
    """Of each group the first of the lowest numbers: of 0 and -0 the first. [groups]"""
    return x.gather(0, x.argmin(0, keepdim=True))[0]


def first_highest(x: torch.Tensor) -> torch.Tensor:
    """Of each group the first of the highest numbers. [groups]"""
    return x.gather(0, x.argmax(0, keepdim=True))[0]


def _float(number: float) -> float:
    """The nearest fp32 number."""
    return float(torch.tensor(number, dtype=torch.float32))


@cache
def _trial_numbers(first: float, step: float, count: int, top: int) -> list[float]:
    """(first + step · i) + top for i from 0 on, every operation in fp32."""
    index = torch.arange(count, dtype=torch.float32)
    return (index * step + _float(first) + float(top)).tolist()


def search_affine(
    x: torch.Tensor,
    weights: torch.Tensor,
    top: int,
    *,
    first: float,
    step: float,
    trials: int,
    absolute: bool = False,
) -> Found:
    """`low + scale · code`, low at most 0, with codes from 0 to `top`.

    For each trial the codes are what `first + step · i` more codes than there are would give over
    the group's range, from the best `low` so far on; the weighted least-squares line through them
    is kept where its error is the least so far, of squares, or of magnitudes where `absolute`.
    """
    low, high = first_lowest(x), x.amax(0)
    low = torch.where(low > 0, 0.0, low)
    is_flat = high <= low

    def codes_of(inverse: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        return nearest((x - low).mul_(inverse)).clamp_(0, top)

    def error_of(codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        difference = codes.mul(scale).add_(low).sub_(x)
        difference = difference.abs_() if absolute else difference.square_()
        return in_turn(difference.mul_(weights))

    weight_sum, x_sum = in_turn(weights), in_turn(weights * x)
    inverse, origin = over(float(top), high - low), low
    scale = over(1.0, inverse)
    best = error_of(codes_of(inverse, low), scale, low)
    products = torch.empty((len(x), 3, x.shape[1]))
    for number in _trial_numbers(first, step, trials, top):
        trial = over(number, high - low)
        codes = codes_of(trial, low)
        torch.mul(weights, codes, out=products[:, 0])
        torch.mul(products[:, 0], codes, out=products[:, 1])
        torch.mul(products[:, 0], x, out=products[:, 2])
        one, two, mixed = in_turn(products)
        determinant = weight_sum * two - one * one
        slope = (weight_sum * mixed - x_sum * one) / determinant
        offset = (two * x_sum - one * mixed) / determinant
        slope = torch.where(offset > 0, mixed / two, slope)  # then the line goes through zero
        offset = torch.where(offset > 0, 0.0, offset)
        error = error_of(codes, slope, offset)
        better = (determinant > 0) & (error < best)
        best = torch.where(better, error, best)
        scale = torch.where(better, slope, scale)
        inverse, origin = torch.where(better, trial, inverse), torch.where(better, low, origin)
        low = torch.where(better, offset, low)
    codes = torch.where(is_flat, 0.0, codes_of(inverse, origin))
    return Found(torch.where(is_flat, 0.0, scale), codes, low)


def search_symmetric(x: torch.Tensor, weights: torch.Tensor, half: int) -> Found:
    """`scale · (code - half)`, the scale of either sign, with codes from 0 to `2 · half - 1`: of
    nineteen scales about the one that puts the extreme on the code 0, refitted, the best.
    """
    extreme = first_extreme(x)
    is_zero = extreme.abs() < _NO_GROUP
    weighted = weights * x

    def codes_of(inverse: torch.Tensor) -> torch.Tensor:
        return nearest(inverse * x).clamp_(-half, half - 1)

    def fit(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        products = torch.empty((len(x), 2, x.shape[1]))
        torch.mul(weighted, codes, out=products[:, 0])
        torch.mul(weights, codes, out=products[:, 1])
        products[:, 1].mul_(codes)
        mixed, square = in_turn(products)
        return mixed, square

    inverse = over(-float(half), extreme)
    mixed, square = fit(codes_of(inverse))
    scale = ratio(mixed, square)
    best = scale * mixed
    tenth = torch.tensor(0.1)
    for step in (*range(-9, 0), *range(1, 10)):
        trial = over(-float(half + tenth * step), extreme)
        mixed, square = fit(codes_of(trial))
        better = (square > 0) & (mixed * mixed > best * square)
        fitted = mixed / square
        scale = torch.where(better, fitted, scale)
        best = torch.where(better, fitted * mixed, best)
        inverse = torch.where(better, trial, inverse)
    codes = torch.where(is_zero, 0.0, codes_of(inverse) + half)
    return Found(torch.where(is_zero, 0.0, scale), codes)


def search_refined(x: torch.Tensor, half: int) -> Found:
    """As `search_symmetric` with squares as weights, but from one scale only, whose codes are then
    moved one after another where that brings the fitted line closer; codes from -half to half - 1.
    """
    extreme = first_extreme(x)
    is_zero = extreme.abs() < _NO_GROUP
    codes = nearest(over(-float(half), extreme) * x).clamp_(-half, half - 1)
    weights = x * x
    weighted = weights * x
    mixed, square = in_turn(weighted * codes), in_turn(weights * codes * codes)
    scale = _refine(x, weights, codes, mixed, square, (-half, half - 1), needs_others=False)
    codes = torch.where(is_zero, 0.0, codes + half)
    return Found(torch.where(is_zero, 0.0, scale), codes)


def search_positive(x: torch.Tensor, weights: torch.Tensor, top: int) -> Found:
    """`scale · code` for numbers that are not negative, with codes from 0 to `top`: the best
    of nine scales by squared error, whose codes are then moved as in `search_refined`.
    """
    largest = x.amax(0).clamp_(min=0.0)
    is_zero = largest < _NO_GROUP

    def error_of(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        difference = x - scale * codes
        return in_turn(weights * difference * difference)

    inverse = over(float(top), largest)
    best = error_of(_as_byte(nearest(inverse * x)), over(1.0, inverse))
    tenth = torch.tensor(0.1)
    for step in (*range(-4, 0), *range(1, 5)):
        trial = over(float(tenth * step + top), largest)
        error = error_of(nearest(trial * x).clamp_(max=top), over(1.0, trial))
        better = error < best
        best = torch.where(better, error, best)
        inverse = torch.where(better, trial, inverse)
    codes = nearest(inverse * x).clamp_(max=top)
    mixed, square = in_turn(weights * x * codes), in_turn(weights * codes * codes)
    codes = _as_byte(codes)
    scale = _refine(x, weights, codes, mixed, square, (None, top), needs_others=True)
    codes = torch.where(is_zero, 0.0, codes)
    return Found(torch.where(is_zero, 0.0, scale), codes)


def _as_byte(codes: torch.Tensor) -> torch.Tensor:
    """What an unsigned byte keeps of whole numbers."""
    return torch.where(codes < 0, codes + 256, codes)


def _refine(
    x: torch.Tensor,
    weights: torch.Tensor,
    codes: torch.Tensor,
    mixed: torch.Tensor,
    square: torch.Tensor,
    bounds: tuple[int | None, int],
    *,
    needs_others: bool,
) -> torch.Tensor:
    """Move one of `codes` after another, in place, where that brings the line fitted through them
    closer; returns its scale. `mixed` and `square` are the sums that the fit starts from. With
    `needs_others` a code moves only where the others alone have a scale.
    """
    low, high = bounds
    weighted = weights * x
    for _ in range(_REFINEMENTS):
        moved = False
        for index, code in enumerate(codes):
            weight, product = weights[index], weighted[index]
            other_mixed = mixed - product * code
            other_square = square - weight * code * code
            candidate = nearest(x[index] * other_square / other_mixed).clamp_(low, high)
            new_mixed = other_mixed + product * candidate
            new_square = other_square + weight * candidate * candidate
            better = (other_mixed > 0) & (candidate != code)
            better &= (other_square if needs_others else new_square) > 0
            better &= new_mixed * new_mixed * square > mixed * mixed * new_square
            if better.any():
                moved = True
                kept = _as_byte(candidate) if needs_others else candidate
                codes[index] = torch.where(better, kept, code)
                mixed = torch.where(better, new_mixed, mixed)
                square = torch.where(better, new_square, square)
        if not moved:
            break
    return torch.where(square > 0, mixed / square, 0.0)


@cache
def _level_table() -> torch.Tensor:
    """The number of the nearest of IQ4_NL's levels for each half from -128 on, the upper of two
    equally near: levels are whole numbers, so between two halves it does not change. [512]
    """
    levels = torch.tensor(IQ4_NL_LEVELS, dtype=torch.float32)
    halves = torch.arange(512) / 2 - 128
    return torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2, right=True)


def _half_index(x: torch.Tensor) -> torch.Tensor:
    halves = (x * 2).floor_().clamp_(-256, 255).nan_to_num_(255)  # infinity times zero
    return halves.add_(256).to(torch.int64)


def nearest_level(x: torch.Tensor) -> torch.Tensor:
    """The number of the nearest of IQ4_NL's levels, int64."""
    return torch.take(_level_table(), _half_index(x))


def search_levels(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The scale [groups] for IQ4_NL's levels: of fifteen about the one that puts the extreme on the
    first level, refitted, the best.
    """
    levels = torch.tensor(IQ4_NL_LEVELS, dtype=torch.float32)[_level_table()]
    extreme = first_extreme(x)

    def fit(inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.take(levels, _half_index(inverse * x))
        weighted = weights * chosen
        return in_turn(weighted * x), in_turn(weighted * chosen)

    first = over(1.0, -extreme / IQ4_NL_LEVELS[0])
    mixed, square = fit(first)
    scale = torch.where(square > 0, mixed / square, 0.0)
    best = scale * mixed
    for step in range(-7, 8):
        mixed, square = fit(over(float(step + IQ4_NL_LEVELS[0]), extreme))
        better = (square > 0) & (mixed * mixed > best * square)
        fitted = mixed / square
        scale = torch.where(better, fitted, scale)
        best = torch.where(better, fitted * mixed, best)
    return torch.where(extreme.abs() < _NO_GROUP, 0.0, scale)
