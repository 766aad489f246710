"""One matrix beside its parent: how far its outputs lie from the parent's, for what the parent
reads.

What feeds a matrix may have been made smaller and the matrix larger by as much, as AWQ does; such
factors are taken out, so that a matrix is only blamed for what is its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwenkit.quantize.grid import Grid, round_to_nearest

_YARDSTICK_GROUP = 128
_FOLDED = 0.2  # a factor and its inverse agree within this
_CORRELATED = 0.7  # rounding moves a row and its reader's column as well, but not together


@dataclass(slots=True)
class Pair:
    """A matrix `own` and its `parent`, both fp32 [rows, columns], with what their biases differ by.

    `factors_in` [columns] is what this matrix's inputs are of the parent's, `factors_out` [rows]
    what its outputs are. `yardstick` is the parent rounded to nearest in as many bits.
    """

    parent: torch.Tensor
    own: torch.Tensor
    bias: torch.Tensor | None
    yardstick: torch.Tensor | None
    factors_in: torch.Tensor
    factors_out: torch.Tensor
    _sums: torch.Tensor  # fp64 [3, rows]: squares of the parent's outputs and of the two errors
    tokens: int = 0

    def add(self, x: torch.Tensor) -> None:
        """Take inputs of the parent in, fp32 [tokens, columns]."""
        exact = x @ self.parent.T
        off = (x * self.factors_in) @ self.own.T / self.factors_out - exact
        if self.bias is not None:
            off += self.bias
        rounding = torch.zeros_like(off)
        if self.yardstick is not None:
            rounding = x @ self.yardstick.T - exact
        self._sums += torch.stack(
            [each.square().sum(0, dtype=torch.float64) for each in (exact, off, rounding)]
        )
        self.tokens += len(x)

    @property
    def error(self) -> float:
        """Root mean square of the outputs' error, relative to the parent's outputs."""
        exact, off, _ = self._sums.sum(1).tolist()
        return float((off / exact) ** 0.5) if exact else float(off > 0)

    @property
    def beside_rounding(self) -> float | None:
        """The error as a multiple of what rounding to nearest would have made."""
        if self.yardstick is None:
            return None
        _, off, rounding = self._sums.sum(1).tolist()
        return float((off / rounding) ** 0.5) if rounding else None

    def worst_row(self) -> tuple[int, float] | None:
        """The row whose error is the largest multiple of rounding's, and that multiple."""
        rounding = self._sums[2]
        if self.yardstick is None or not bool((rounding > 0).any()):
            return None
        floor = rounding.mean() * 1e-2  # rows that are nearly zero are nothing to be measured by
        ratios = (self._sums[1] / torch.maximum(rounding, floor)).sqrt()
        row = int(ratios.argmax())
        return row, float(ratios[row])


def make_pair(
    parent: torch.Tensor,
    own: torch.Tensor,
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    bits: int | None,
    factors_in: torch.Tensor,
    factors_out: torch.Tensor | None,
) -> Pair:
    """`bits` are those of the matrix's format; None for plain numbers, which have no yardstick."""
    rows, columns = parent.shape
    out = torch.ones(rows) if factors_out is None else factors_out
    bias = None
    if biases[0] is not None or biases[1] is not None:
        first, second = (torch.zeros(rows) if b is None else b for b in biases)
        bias = second / out - first
    yardstick = None
    if bits is not None:
        size = _YARDSTICK_GROUP if columns % _YARDSTICK_GROUP == 0 else -1
        yardstick = round_to_nearest(parent, Grid(bits, size, symmetric=False)).dequantize()
    sums = torch.zeros(3, rows, dtype=torch.float64)
    return Pair(parent, own, bias, yardstick, factors_in, out, sums)


def folded_factors(
    parent: torch.Tensor,
    own: torch.Tensor,
    reader_parent: torch.Tensor,
    reader_own: torch.Tensor,
) -> torch.Tensor | None:
    """By how much each row of a matrix was scaled, where the columns of what reads its outputs were
    scaled back: [rows]. None where nothing was.

    A row that is scaled and its reader's column not is no folding, and keeps the factor one.
    """
    factors = _sizes(own, parent, 1)  # [rows]
    back = _sizes(reader_own, reader_parent, 0)  # [rows]
    both = (factors > 0) & (back > 0)
    if float(both.float().mean()) < 0.5:
        return None
    moved, returned = factors[both].log(), -back[both].log()
    moved, returned = moved - moved.mean(), returned - returned.mean()
    lengths = float(moved.norm() * returned.norm())
    if lengths == 0 or float(moved @ returned) < _CORRELATED * lengths:
        return None
    agree = both & ((factors * back - 1).abs() < _FOLDED)
    return torch.where(agree, (factors / back).abs().sqrt(), 1.0)


def _sizes(own: torch.Tensor, parent: torch.Tensor, along: int) -> torch.Tensor:
    """The best multiples of the parent's rows or columns for the matrix's own."""
    squares = parent.square().sum(along)
    return (own * parent).sum(along) / torch.where(squares == 0, 1.0, squares)
