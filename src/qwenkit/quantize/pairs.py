"""One matrix beside its parent: how far its outputs lie from the parent's, for what the parent
reads.

What feeds a matrix may have been made smaller and the matrix larger by as much, as AWQ does; such
factors are taken out, so that a matrix is only blamed for what is its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from qwenkit.quantize.grid import Grid, find_grid

_FOLDED = 0.2  # a factor and its inverse agree within this
_PROBES = 64  # random directions by which it is seen in how few directions inputs lie
# One row in 1e10 is off by chance as far as is allowed: a model of 72B has 1e7 rows.
_RARE = math.log(1e10)
_CORRELATED = 0.7  # rounding moves a row and its reader's column as well, but not together


@dataclass(slots=True)
class Pair:
    """A matrix `own` and its `parent`, both fp32 [rows, columns], with what their biases differ by.

    `factors_in` [columns] is what this matrix's inputs are of the parent's, `factors_out` [rows]
    what its outputs are. `steps` [rows, groups] are the distances between the levels of the parent
    rounded to nearest in the same format; None of plain numbers.
    """

    parent: torch.Tensor
    own: torch.Tensor
    bias: torch.Tensor | None
    steps: torch.Tensor | None
    factors_in: torch.Tensor
    factors_out: torch.Tensor
    _sums: torch.Tensor  # fp64 [2, rows]: squares of the parent's outputs and of their errors
    _read: torch.Tensor  # fp64 [columns]: squares of the inputs
    _moments: torch.Tensor  # fp64 [probes, probes]: of the inputs, seen in random directions
    tokens: int = 0

    def add(self, x: torch.Tensor) -> None:
        """Take inputs of the parent in, fp32 [tokens, columns]."""
        exact = x @ self.parent.T
        off = (x * self.factors_in) @ self.own.T / self.factors_out - exact
        if self.bias is not None:
            off += self.bias
        self._sums += torch.stack([y.square().sum(0, dtype=torch.float64) for y in (exact, off)])
        self._read += x.square().sum(0, dtype=torch.float64)
        if self.steps is not None:
            mean = self.steps.square().mean(0).sqrt()  # [groups]
            weighted = x.reshape(len(x), len(mean), -1) * mean[:, None]
            seen = (weighted.view(x.shape) @ _probes(x.shape[1])).double()
            self._moments += seen.T @ seen
        self.tokens += len(x)

    @property
    def error(self) -> float:
        """Root mean square of the outputs' error, relative to the parent's outputs."""
        exact, off = self._sums.sum(1).tolist()
        return float((off / exact) ** 0.5) if exact else float(off > 0)

    @property
    def beside_rounding(self) -> float | None:
        """The error as a multiple of what rounding to nearest is expected to make."""
        expected = self._expected()
        if expected is None or not bool(expected.any()):
            return None
        return float((self._sums[1].sum() / expected.sum()).sqrt())

    def worst_row(self) -> tuple[int, float] | None:
        """The row whose error is the largest multiple of rounding's, and that multiple."""
        expected = self._expected()
        if expected is None or not bool(expected.any()):
            return None
        floor = expected.mean() * 1e-2  # rows that are nearly zero are nothing to be measured by
        ratios = (self._sums[1] / torch.maximum(expected, floor)).sqrt()
        row = int(ratios.argmax())
        return row, float(ratios[row])

    def by_chance(self) -> tuple[float, float] | None:
        """The multiples of what rounding is expected to make that it exceeds in one case of 1e10,
        for these very inputs: of the whole matrix, and of a row.

        A row's squared error is e' H e, of rounding errors e that are independent and inputs whose
        sum of x x' is H. Where few tokens were seen, or all are nearly alike, H has few directions,
        and what a row is off by hangs on few numbers. With errors spread evenly between levels it
        is at most 1 + 2 √(t Σ s²) + 2 t max s times what is expected, but once in eᵗ cases (Hsu,
        Kakade, Zhang, arXiv 1110.2842); s are H's eigenvalues as shares of their sum. They are
        those of H seen in random directions, with the mean row's steps.
        """
        expected = self._expected()
        if expected is None or not bool(expected.any()):
            return None
        values = torch.linalg.eigvalsh(self._moments).clamp_min(0)
        shares, rows = values / values.sum(), expected / expected.sum()
        squares, most = float(shares.square().sum()), float(shares.max())
        of_all = float(rows.square().sum()), float(rows.max())  # rows are rounded independently
        return _rarely(squares * of_all[0], most * of_all[1]), _rarely(squares, most)

    def _expected(self) -> torch.Tensor | None:
        """Squares of the errors of rounding, fp64 [rows]: of each number a twelfth of its step's
        square, and none in step with another. What chance makes of it for these very inputs would
        be nothing to measure rows by where inputs are nearly alike.
        """
        if self.steps is None:
            return None
        read = self._read.view(self.steps.shape[1], -1).sum(1)  # [groups]
        return self.steps.double().square() @ read / 12


def make_pair(
    parent: torch.Tensor,
    own: torch.Tensor,
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    grid: Grid | None,
    factors_in: torch.Tensor,
    factors_out: torch.Tensor | None,
) -> Pair:
    """`grid` is that of the matrix's format, whose groups divide the columns; None for plain
    numbers, which have no yardstick.
    """
    rows, columns = parent.shape
    out = torch.ones(rows) if factors_out is None else factors_out
    bias = None
    if biases[0] is not None or biases[1] is not None:
        first, second = (torch.zeros(rows) if b is None else b for b in biases)
        bias = second / out - first
    steps = None
    if grid is not None:
        size = grid.columns_of(parent)
        steps, _ = find_grid(parent.view(rows, columns // size, size), grid)
    sums = torch.zeros(2, rows, dtype=torch.float64)
    read = torch.zeros(columns, dtype=torch.float64)
    moments = torch.zeros(_PROBES, _PROBES, dtype=torch.float64)
    return Pair(parent, own, bias, steps, factors_in, out, sums, read, moments)


def _rarely(squares: float, most: float) -> float:
    return math.sqrt(1 + 2 * math.sqrt(_RARE * squares) + 2 * _RARE * most)


@lru_cache(maxsize=4)
def _probes(columns: int) -> torch.Tensor:
    """The same random directions every time, fp32 [columns, probes]."""
    generator = torch.Generator().manual_seed(columns)
    return torch.randn(columns, _PROBES, generator=generator)


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
