"""The largest of every so many scores: what a search of the few largest of all has to look at."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.kernels.registry import Arguments, Op


def _reference(scores: torch.Tensor, columns: int) -> torch.Tensor:
    """scores [rows, n] to [rows, columns]: entry j is the largest of those at j, j + columns,
    j + 2 · columns and so on, and NaN where one of them is NaN or infinite. 1 ≤ columns ≤ n.
    """
    rows, n = scores.shape
    lines = -(-n // columns)
    padded = scores.new_full((rows, lines * columns), -torch.inf)
    padded[:, :n] = scores
    maxima = padded.view(rows, lines, columns).amax(1)  # [rows, columns]
    bad = scores.new_zeros((rows, lines * columns), dtype=torch.bool)
    bad[:, :n] = ~torch.isfinite(scores)
    return maxima.masked_fill(bad.view(rows, lines, columns).any(1), torch.nan)


def _shape(scores: torch.Tensor, columns: int) -> torch.Tensor:
    return scores.new_empty((scores.shape[0], columns))


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for rows, n, columns in ((1, 1, 1), (2, 7, 3), (3, 100, 1), (1, 100, 100), (2, 4999, 78)):
        scores = torch.randn(rows, n, generator=generator) * 10
        yield scores, columns
        yield -scores.abs(), columns
        spoiled = scores.clone()
        for value in (torch.nan, torch.inf, -torch.inf):
            place = int(torch.randint(n, (1,), generator=generator))
            spoiled[-1, place] = value
            yield spoiled.clone(), columns
        yield scores.to(torch.bfloat16), columns
    yield torch.randn(1, 6000, generator=generator)[:, 500:5500], 64


column_maxima = Op(
    name="column_maxima",
    schema="(Tensor scores, int columns) -> Tensor",
    reference=_reference,
    shape=_shape,
    cases=_cases,
    tolerance=0.0,
)
