"""A model beside its parent, layer by layer: every matrix by itself, and both as wholes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from qwenkit.errors import UsageError
from qwenkit.quantize.anatomy import Feed, Part, layer_parts, published_paths
from qwenkit.quantize.grid import Grid
from qwenkit.quantize.observe import Watch
from qwenkit.quantize.pairs import Pair, folded_factors, make_pair
from qwenkit.quantize.stream import Batch, Held, LayerSource, batches
from qwenkit.score import kl_divergence, perplexity, token_logprobs, top1_agreement

_ERROR_TOKENS = 2048  # that each matrix is looked at with
_LOGIT_ROWS = 256
_USUAL_GROUP = 128
# Errors that rounding to few bits explains, and another dtype: a norm has no fewer.
_ROUNDED, _NARROWED = 0.5, 0.05
_OVERHEAD_BITS = 0.51  # of scales and zero points, of formats whose bits per weight tell their bits


@dataclass(frozen=True, slots=True)
class MatrixComparison:
    """One matrix beside its parent's, by its published path.

    `error` is that of its outputs, root mean square relative to the parent's; `beside_rounding` is
    it as a multiple of what rounding the parent to nearest in as many bits and the same groups is
    expected to make; `worst_row` the row where this multiple is the largest, and `worst_row_beside`
    that. `by_chance` and `row_by_chance` are the multiples that rounding itself may come to by
    chance, of the matrix and of a row: large where few tokens were seen. These five are None for
    plain numbers. `storage` is the tag of its format, or None.
    """

    path: str
    storage: str | None
    bits_per_weight: float
    error: float
    beside_rounding: float | None = None
    worst_row: int | None = None
    worst_row_beside: float | None = None
    by_chance: float | None = None
    row_by_chance: float | None = None


@dataclass(slots=True)
class Comparison:
    """Everything that was measured.

    `ends` are the embedding, the last norm and the head, by what they make of the parent's own
    inputs: path, error relative to the parent's, and the largest that rounding explains. Text
    figures are None where no text was given. `kl` is the mean of KL(parent || model) in nats,
    `top1` the share of tokens after which both find the same token likeliest. `drifts` say for each
    layer how far what leaves it lies from the parent's. `largest` are the largest magnitudes in the
    parent, by module path. Bytes are those of all tensors; `bits_per_weight` is that of the
    quantized matrices.
    """

    tokens: int
    matrices: list[MatrixComparison] = field(default_factory=list)
    ends: list[tuple[str, float, float]] = field(default_factory=list)
    drifts: list[float] = field(default_factory=list)
    largest: dict[str, float] = field(default_factory=dict)
    parent_bytes: int = 0
    own_bytes: int = 0
    bits_per_weight: float | None = None
    parent_perplexity: float | None = None
    own_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None


def compare(
    parent: LayerSource,
    own: LayerSource,
    rows: Sequence[Sequence[int]],
    *,
    is_text: bool,
    told: Callable[[float], None] = lambda share: None,
) -> Comparison:
    """Run both on `rows` of ids. Without `is_text`, what they predict is not scored.

    Raises UsageError where the models are not of one shape.
    """
    check_alike(parent, own)
    found = Comparison(tokens=sum(map(len, rows)))
    found.parent_bytes = sum(t.size_bytes for t in parent.checkpoint.tensors.values())
    found.own_bytes = sum(t.size_bytes for t in own.checkpoint.tensors.values())
    parts = batches([len(row) for row in rows])
    ours, theirs = list(own.embedded(rows)), list(parent.embedded(rows))
    found.ends.append((parent.anatomy.embedding, _drift(theirs, ours), _ROUNDED))
    bits: list[Held] = []
    for number in range(parent.layer_count):
        (first, _), (second, held) = parent.layer(number), own.layer(number)
        pairs = zip(
            layer_parts(first, parent.anatomy), layer_parts(second, own.anatomy), strict=True
        )
        for exact, part in pairs:
            beside = _PartPair(parent.layer_path(number), exact, part, held)
            for i, batch in enumerate(parts):
                theirs[i] = beside.run(theirs[i], parent, batch)
                ours[i] = part.run(ours[i], own.context(batch.lengths))
            found.matrices += beside.results()
            for path, size in beside.watch.largest.items():
                found.largest[f"{parent.layer_path(number)}.{path}"] = size
        bits += [each for each in held.values() if each.storage is not None]
        found.drifts.append(_drift(theirs, ours))
        told((number + 1) / (parent.layer_count + 1))
    if bits:
        numbers = sum(each.numbers for each in bits)
        found.bits_per_weight = 8 * sum(each.size_bytes for each in bits) / numbers
    found.ends += _last_ends(parent, own, theirs[0][:_LOGIT_ROWS])
    if is_text:
        _score(found, parent, own, rows, theirs, ours)
    told(1.0)
    return found


def check_alike(parent: LayerSource, own: LayerSource) -> None:
    """Raises UsageError naming what the two differ in."""
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        values = [getattr(source.config, name) for source in (parent, own)]
        if values[0] != values[1]:
            raise UsageError(
                f"{name}: {values[0]} in {parent.checkpoint.path}, {values[1]} in "
                f"{own.checkpoint.path}; only a model and what was made of it can be compared."
            )
    if parent.anatomy != own.anatomy:
        kinds = " and ".join(s.record.model_type for s in (parent, own))
        raise UsageError(f"model_type: {kinds} have other matrices and cannot be compared.")
    widths = [getattr(source.config, "intermediate_size", 0) for source in (parent, own)]
    if widths[0] != widths[1]:
        raise UsageError(
            f"intermediate_size: {widths[0]} in {parent.checkpoint.path}, {widths[1]} in "
            f"{own.checkpoint.path}. Where one was padded, pad the other too: qwenkit export "
            "MODEL OUT --folder --pad-for-tp N."
        )


class _PartPair:
    """A part of a layer beside the parent's."""

    def __init__(self, layer: str, parent: Part, own: Part, held: dict[str, Held]) -> None:
        self.watch = Watch(parent)
        self._layer, self._parent, self._own, self._held = layer, parent, own, held
        self._pairs: dict[str, list[Pair]] = {}
        for theirs, ours in zip(parent.feeds(), own.feeds(), strict=True):
            for path in theirs.matrices:
                self._pairs[path] = self._of(path, theirs, ours)

    def run(self, x: torch.Tensor, source: LayerSource, batch: Batch) -> torch.Tensor:
        """The parent's part on the parent's own x, every matrix's inputs taken in."""
        return self.watch.run(x, source.context(batch.lengths), self._take)

    def results(self) -> Iterator[MatrixComparison]:
        """Of every matrix that anything came to."""
        for feed in self._parent.feeds():
            for path, matrix in feed.matrices.items():
                held = self._held[path]
                for name, pair in zip(
                    published_paths(path, matrix), self._pairs[path], strict=True
                ):
                    if pair.tokens:
                        worst, chance = pair.worst_row(), pair.by_chance()
                        yield MatrixComparison(
                            f"{self._layer}.{name}",
                            held.storage,
                            8 * held.size_bytes / held.numbers,
                            pair.error,
                            pair.beside_rounding,
                            None if worst is None else worst[0],
                            None if worst is None else worst[1],
                            None if chance is None else chance[0],
                            None if chance is None else chance[1],
                        )

    def _take(self, feed: Feed, x: torch.Tensor, ends: torch.Tensor | None) -> None:
        start = 0
        for number, stop in enumerate([len(x)] if ends is None else ends.tolist()):
            for path in feed.matrices:
                pair = self._pairs[path][number]
                wanted = min(stop - start, _ERROR_TOKENS - pair.tokens)
                if wanted > 0:
                    pair.add(x[start : start + wanted])
            start = stop

    def _of(self, path: str, theirs: Feed, ours: Feed) -> list[Pair]:
        """The pairs of one matrix, or of each of its experts."""
        exact, made = theirs.matrices[path], ours.matrices[path]
        rows, held = exact.out_features, self._held[path]
        count = len(published_paths(path, exact))
        biases = getattr(exact, "bias", None), getattr(made, "bias", None)
        pairs = []
        for number in range(count):
            part = slice(number * rows, (number + 1) * rows)
            pairs.append(
                make_pair(
                    _numbers(exact)[part],
                    _numbers(made)[part],
                    biases,
                    _yardstick(held, exact.in_features),
                    self._factors_in(theirs, number),
                    self._factors_out(path, number),
                )
            )
        return pairs

    def _factors_in(self, feed: Feed, number: int) -> torch.Tensor:
        """What the matrix's inputs are of the parent's."""
        columns = feed.first.in_features
        if feed in self._parent.stages[0]:
            exact, made = self._parent.norm.weight.detach(), self._own.norm.weight.detach()
            return torch.where(exact == 0, 1.0, made / torch.where(exact == 0, 1.0, exact))
        found = None
        if feed.source is not None:
            found = self._factors_out(feed.source, number)
        return torch.ones(columns) if found is None else found

    def _factors_out(self, path: str, number: int) -> torch.Tensor | None:
        """What the matrix's outputs are of the parent's, where what reads them makes up for it."""
        readers = [
            (theirs, ours)
            for theirs, ours in zip(self._parent.stages[1], self._own.stages[1], strict=True)
            if theirs.source == path
        ]
        if not readers:
            return None
        [(theirs, ours)] = readers
        sources = [
            next(f.matrices[path] for f in part.stages[0] if path in f.matrices)
            for part in (self._parent, self._own)
        ]
        if sources[0].out_features != theirs.first.in_features:
            return None
        rows = sources[0].out_features
        part = slice(number * rows, (number + 1) * rows)
        factors_in = self._factors_in(self._parent.stages[0][0], number)
        columns = theirs.first.out_features
        reader = slice(number * columns, (number + 1) * columns)
        return folded_factors(
            _numbers(sources[0])[part],
            _numbers(sources[1])[part] * factors_in,
            _numbers(theirs.first)[reader],
            _numbers(ours.first)[reader],
        )


def _numbers(matrix: nn.Module) -> torch.Tensor:
    weight = matrix.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach()


def _yardstick(held: Held, columns: int) -> Grid | None:
    """The grid of which rounding to nearest is what a matrix is measured by: the format's own, so
    that what was rounded to nearest is its own measure; None for plain numbers.

    Where the format says no bits, those that numbers take with scales; where it says no groups that
    divide the row, 128 columns, or else the row.
    """
    if held.storage is None:
        return None
    taken = round(8 * held.size_bytes / held.numbers - _OVERHEAD_BITS)
    bits = min(8, max(2, taken)) if held.bits is None else held.bits
    sizes = (held.group_size or _USUAL_GROUP, _USUAL_GROUP)
    size = next((size for size in sizes if columns % size == 0), columns)
    return Grid(bits, size, held.is_symmetric)


def _drift(theirs: Sequence[torch.Tensor], ours: Sequence[torch.Tensor]) -> float:
    """The mean over tokens of how far a token's state lies from the parent's, relative to it."""
    length = torch.linalg.vector_norm
    ratios = [
        length(a - b, dim=1) / length(a, dim=1).clamp_min(1e-30)
        for a, b in zip(theirs, ours, strict=True)
    ]
    return float(torch.cat(ratios).mean())


def _last_ends(
    parent: LayerSource, own: LayerSource, x: torch.Tensor
) -> list[tuple[str, float, float]]:
    """The last norm and the head, of the parent's states x [tokens, hidden_size]."""
    first, second = parent.finish(), own.finish()
    exact, made = first.norm(x), second.norm(x)
    return [
        (parent.anatomy.norm, _drift([exact], [made]), _NARROWED),
        ("lm_head", _drift([first.head(exact)], [second.head(exact)]), _ROUNDED),
    ]


def _score(
    found: Comparison,
    parent: LayerSource,
    own: LayerSource,
    rows: Sequence[Sequence[int]],
    theirs: Sequence[torch.Tensor],
    ours: Sequence[torch.Tensor],
) -> None:
    """What the last states predict: each token but the first of its row."""
    ids = torch.tensor([i for row in rows for i in row])
    wanted = torch.tensor([n > 0 for row in rows for n in range(len(row))])
    places = wanted.nonzero()[:, 0] - 1  # whose next token is of the same row
    exact, made = torch.cat(list(theirs))[places], torch.cat(list(ours))[places]
    targets = ids[places + 1]
    first, second = parent.finish(), own.finish()
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(places), _LOGIT_ROWS):
        part = slice(start, start + _LOGIT_ROWS)
        one, other = first(exact[part]), second(made[part])
        figures = (
            token_logprobs(one, targets[part]),
            token_logprobs(other, targets[part]),
            kl_divergence(one, other),
            top1_agreement(one, other).double(),
        )
        sums += torch.stack([each.sum() for each in figures])
    means = [value / max(len(places), 1) for value in sums.tolist()]
    found.parent_perplexity, found.own_perplexity = perplexity(means[0]), perplexity(means[1])
    found.kl, found.top1 = max(means[2], 0.0) if math.isfinite(means[2]) else means[2], means[3]
