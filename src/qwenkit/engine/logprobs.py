"""Log-probabilities of tokens under the model's raw distribution: rows of logits to numbers.

That distribution is the softmax over all rows of the model's matrix, before any penalty, bias,
temperature or filter; ids that pad the matrix have their share of it but are never reported. A row
is worked on alone, so its numbers depend on nothing but its logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import torch
from numpy.typing import NDArray

from qwenkit.errors import NonFiniteError
from qwenkit.kernels.ops.column_maxima import column_maxima
from qwenkit.types.events import TokenLogprob

Floats = NDArray[numpy.float32]
Indices = NDArray[numpy.int64]

_COLUMN = 64  # scores whose maximum stands for them in the search of the k-th largest


def in_fp32(logits: torch.Tensor) -> Floats:
    """Logits of any shape, float dtype and device as an array that may share the tensor's memory;
    not to be written to.
    """
    logits = logits.cpu()
    if logits.dtype == torch.bfloat16:  # unknown to numpy: the upper half of an fp32 number
        halves = logits.view(torch.int16).numpy().view(numpy.uint16)  # shape of logits
        return (halves.astype(numpy.uint32) << 16).view(numpy.float32)
    with numpy.errstate(over="ignore"):  # of fp64, to an infinity that is then refused
        return logits.numpy().astype(numpy.float32, copy=False)


def check_finite(row: Floats, what: str) -> None:
    """Raise NonFiniteError when one of the logits [vocab_rows] is no finite number: nothing
    sensible can be made of them. `what` says whose they are.
    """
    finite = numpy.isfinite(row)
    if not finite.all():
        bad = len(row) - numpy.count_nonzero(finite)
        raise NonFiniteError(
            f"{bad} of the model's {len(row)} logits for {what} are NaN or infinite and give no "
            "distribution. Weights that overflow the compute dtype do this: try float32."
        )


def prompt_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], *, count: int, vocab_size: int, start: int = 1
) -> tuple[TokenLogprob, ...]:
    """What each row of logits [rows, vocab_rows] says of the token that came after it.

    `token_ids` [rows] are these tokens: row i was computed at position `start` - 1 + i of a
    sequence and `token_ids[i]` stands at `start` + i. `count` most likely tokens below `vocab_size`
    are reported beside each. Raises NonFiniteError naming the position.
    """
    entries = []
    for position, (row, token_id) in enumerate(zip(logits, token_ids, strict=True), start):
        scores = in_fp32(row)  # [vocab_rows]
        check_finite(scores, f"token {position} of the prompt")
        entries.append(token_logprob(scores, token_id, count=count, vocab_size=vocab_size))
    return tuple(entries)


def token_logprob(row: Floats, token_id: int, *, count: int, vocab_size: int) -> TokenLogprob:
    """The log-probability of `token_id` by finite logits [vocab_rows], and the `count` most likely
    ids below `vocab_size`, most likely first, of equal ones the lower.
    """
    largest = row.max()
    with numpy.errstate(over="ignore"):  # to -inf, whose weight is 0
        weights = row - largest  # [vocab_rows]
    numpy.exp(weights, out=weights)
    total = float(largest) + math.log(weights.sum(dtype=numpy.float64))
    ids = largest_ids(row[:vocab_size], count)  # [n]
    ids = ids[numpy.argsort(-row[ids], kind="stable")][:count]  # [count], most likely first
    top = tuple((int(i), float(row[i]) - total) for i in ids)
    return TokenLogprob(token_id, float(row[token_id]) - total, top)


def maxima_of(values: Floats) -> Floats:
    """The largest of `values` [n] in each of the columns that they are laid out in, [columns]: NaN
    where one of them is no finite number.
    """
    columns = max(1, len(values) // _COLUMN)
    if "cpu" in column_maxima.backends:
        maxima: Floats = column_maxima(torch.from_numpy(values)[None], columns)[0].numpy()
        return maxima
    lines = len(values) // columns
    found: Floats = values[: lines * columns].reshape(lines, columns).max(0)  # [columns]
    rest = values[lines * columns :]
    numpy.maximum(found[: len(rest)], rest, out=found[: len(rest)])
    bad = numpy.flatnonzero(~numpy.isfinite(values))
    found[bad % columns] = numpy.nan
    return found


def at_least(values: Floats, floor: float, maxima: Floats) -> Indices:
    """The indices, in ascending order, of those of `values` [n] that are not below `floor`."""
    near = _members(numpy.flatnonzero(maxima >= floor), maxima, values)
    return near[values[near] >= floor]


def largest_ids(values: Floats, count: int, maxima: Floats | None = None) -> Indices:
    """Indices, in ascending order, of the `count` largest of `values` [n] and of what is equal to
    the least of these; all of them if there are no more. `maxima` are `maxima_of(values)`, if they
    are known.

    They are values too: at least `count` values reach the `count`-th largest maximum, so a column
    that does not is not looked into.
    """
    if count == 0 or count >= len(values):
        return numpy.arange(len(values) if count else 0)
    maxima = maxima_of(values) if maxima is None else maxima
    if count > len(maxima):
        return numpy.flatnonzero(values >= _kth_largest(values, count))
    near = _members(numpy.flatnonzero(maxima >= _kth_largest(maxima, count)), maxima, values)
    found = values[near]
    return near[found >= _kth_largest(found, count)]


def largest_id(values: Floats, maxima: Floats) -> int:
    """The index of the largest of `values` [n], of equal ones the first."""
    near = _members(numpy.flatnonzero(maxima == maxima.max()), maxima, values)
    return int(near[values[near].argmax()])


def _members(columns: Indices, maxima: Floats, values: Floats) -> Indices:
    """The indices of all values in some of the columns, in ascending order."""
    lines = numpy.arange(0, len(values), len(maxima))
    near = (lines[:, None] + columns).ravel()  # ascending: a line has all columns
    return near[: numpy.searchsorted(near, len(values))]


def _kth_largest(values: Floats, k: int) -> numpy.float32:
    place = len(values) - k
    result: numpy.float32 = numpy.partition(values, place)[place]
    return result
