"""Logits to one token, by one request's own rules.

Repetition penalty as in CTRL (arXiv 1909.05858), presence and frequency penalties by OpenAI's
formula, nucleus sampling (arXiv 1904.09751), min-p (arXiv 2407.01082); penalties, then the biases
of single tokens, then temperature, top-k, top-p and min-p, with the meaning that transformers gives
them.

Nothing here sees another request: a row is worked on alone, and the random number of an output
token depends on nothing but the request's seed and the token's place in the output. So a seed gives
the same tokens in any batch, in any chunking and after any preemption, if the logits are the same.

Where there are native kernels, all rows of a step are worked on in one call of them, in which each
is alone too; else, and where only some tokens are allowed, row by row in numpy. torch works on more
than 32,768 numbers with its whole OpenMP team, and a decoding engine whose other threads have such
teams too spends longer on waking and spinning than on a row of 151,936 logits.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray

from qwenkit.engine.logprobs import (
    Floats,
    Indices,
    at_least,
    check_finite,
    in_fp32,
    largest_id,
    largest_ids,
    maxima_of,
    token_logprob,
)
from qwenkit.errors import RequestError
from qwenkit.kernels.ops.sample_tokens import KINDS, sample_tokens
from qwenkit.types.sampling import SamplingParams

Bools = NDArray[numpy.bool_]
_NOTHING = numpy.empty(0, numpy.int64), numpy.empty(0, numpy.float32)
_FEW = 1024  # of top-k: so many are sorted as fast by the kernel
NOT_FINITE = -1  # in place of a token: no choice could be made
_LARGEST = numpy.finfo(numpy.float32).max  # so that no penalty makes a score infinite
_COLDEST = 1e-6  # this is greedy but for exact ties, and differences stay far from fp32's end
_STRETCH = 512  # weights that are summed at a time before a draw


@dataclass(frozen=True, slots=True)
class Choice:
    """A sampled token; the log-probabilities as in `TokenEvent`."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None


class Sampler:
    """Chooses one request's tokens one after another and remembers what its penalties need.

    Ids from `vocab_size` on are rows that pad the model's matrix and are never chosen. `stop_ids`
    are those that `min_tokens` puts off. `joins`: `choose_together` is for it; a nucleus of the
    whole vocabulary is found faster by numpy, which has a sort of many numbers.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        prompt_ids: Iterable[int],
        seed: int,
        vocab_size: int,
        stop_ids: Iterable[int],
    ) -> None:
        self._sampling = sampling
        self._seed = seed
        self._vocab_size = vocab_size
        few = 0 < sampling.top_k <= _FEW
        self.joins = sampling.greedy or few or sampling.top_p == 1
        self._length = 0
        self._output_counts: Counter[int] = Counter()
        self._seen = set(prompt_ids) if sampling.repetition_penalty != 1 else set()
        self._seen_ids = numpy.array(sorted(self._seen), numpy.int64)
        self._biased_ids = numpy.array([i for i, _ in sampling.logit_bias], numpy.int64)
        self._biases = numpy.array([bias for _, bias in sampling.logit_bias], numpy.float32)
        early_stops = sorted(stop_ids) if sampling.min_tokens else []
        self._early_stops = numpy.array(early_stops, numpy.int64)
        self._rules = (
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.temperature,
            float(sampling.top_k),
            sampling.top_p,
            sampling.min_p,
        )

    def choose(self, logits: torch.Tensor, allowed: Bools | None = None) -> Choice:
        """The next token, from logits [vocab_rows] of any float dtype on any device; one of those
        that are `allowed` [vocab_size], if that is given.

        Raises NonFiniteError when one of them is no finite number: nothing sensible can be chosen.
        Raises RequestError when only stop tokens are allowed and `min_tokens` puts them off.
        """
        if allowed is None and self.joins and together(logits):
            (chosen,) = choose_together((self,), logits[None], (0,))
            return self._report(chosen, in_fp32(logits))
        row = in_fp32(logits)  # [vocab_rows]
        what = f"output token {self._length}"
        if not numpy.isfinite(row[self._adjusted_ids]).all():
            check_finite(row, what)
        before = self._adjust(row)
        try:
            token_id = self._pick(row[: self._vocab_size], allowed)
        finally:  # the row is the model's
            for ids, values in reversed(before):
                row[ids] = values
        if token_id is None or not numpy.isfinite(row[self._vocab_size :]).all():
            token_id = NOT_FINITE
        return self._report(token_id, row)

    def remember(self, token_id: int) -> Choice:
        """Take note of the next token, which `choose_together` chose."""
        self._length += 1
        sampling = self._sampling
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._output_counts[token_id] += 1
        if sampling.repetition_penalty != 1 and token_id not in self._seen:
            self._seen.add(token_id)
            self._seen_ids = numpy.append(self._seen_ids, token_id)
        return Choice(token_id)

    def _report(self, token_id: int, row: Floats) -> Choice:
        """What was chosen from logits [vocab_rows], remembered and reported on."""
        if token_id == NOT_FINITE:
            check_finite(row, f"output token {self._length}")
            raise AssertionError("what is not finite was found")
        choice, count = self.remember(token_id), self._sampling.logprobs
        if count is None:
            return choice
        report = token_logprob(row, token_id, count=count, vocab_size=self._vocab_size)
        return Choice(token_id, report.logprob, report.top)

    def asks(self) -> tuple[list[float], list[tuple[Indices, Floats]]]:
        """The next token's row of `settings`, and its ids and numbers of each kind, as the op
        `sample_tokens` takes them; no kinds where none has ids.
        """
        number = 0.0 if self._sampling.greedy else uniform(self._seed, self._length)
        early = self._length < self._sampling.min_tokens and len(self._early_stops)
        kinds = []
        if early or self._seen or self._output_counts or len(self._biased_ids):
            kinds = [
                (self._seen_ids, _zeros(self._seen_ids)),
                self._counted,
                (self._biased_ids, self._biases),
                (self._early_stops, _zeros(self._early_stops)) if early else _NOTHING,
            ]
        return [*self._rules, number], kinds

    def _pick(self, scores: Floats, allowed: Bools | None) -> int | None:
        """The next token by adjusted scores [vocab_size]; None where they are not all finite."""
        maxima = maxima_of(scores)  # [columns]
        if not numpy.isfinite(maxima).all():
            return None
        if allowed is not None:
            allowed_ids = numpy.flatnonzero(allowed)  # [n]
            place = self._draw(self._possible(scores[allowed_ids]), None)
            return int(allowed_ids[place])
        return self._draw(scores, maxima)

    def _draw(self, scores: Floats, maxima: Floats | None) -> int:
        """The place of the next token among scores [n]."""
        if self._sampling.greedy:
            return int(scores.argmax()) if maxima is None else largest_id(scores, maxima)
        places, weights = candidates(scores, self._sampling, maxima)
        place = draw(weights, uniform(self._seed, self._length))
        return place if places is None else int(places[place])

    def _possible(self, scores: Floats) -> Floats:
        if scores.max() == -_LARGEST:
            raise RequestError(
                "min_tokens",
                f"nothing can follow {self._length} tokens under this constraint, and "
                f"{self._sampling.min_tokens} are asked for.",
            )
        return scores

    @property
    def _adjusted_ids(self) -> Indices:
        """The ids whose scores `_adjust` may change."""
        counted, _ = self._counted
        return numpy.concatenate((self._seen_ids, counted, self._biased_ids, self._early_stops))

    @property
    def _counted(self) -> tuple[Indices, Floats]:
        """Ids of the output whose number matters, and how often each was there."""
        if not self._output_counts:
            return _NOTHING
        ids = numpy.array(list(self._output_counts), numpy.int64)
        return ids, numpy.array(list(self._output_counts.values()), numpy.float32)

    def _adjust(self, row: Floats) -> list[tuple[Indices, Floats]]:
        """Change scores in place by penalties, biases and what may not come yet; returns what stood
        there, in the order of the changes.
        """
        sampling = self._sampling
        before: list[tuple[Indices, Floats]] = []

        def change(ids: Indices, values: Floats) -> None:
            before.append((ids, row[ids]))
            row[ids] = values

        if sampling.repetition_penalty != 1 and self._seen:
            ids = self._seen_ids
            change(ids, penalize_repetition(row[ids], sampling.repetition_penalty))
        if self._output_counts:
            ids, used = self._counted
            penalties = sampling.presence_penalty, sampling.frequency_penalty
            change(ids, penalize_counts(row[ids], used, *penalties))
        if sampling.logit_bias:
            change(self._biased_ids, row[self._biased_ids] + self._biases)
        if self._length < sampling.min_tokens and len(self._early_stops):
            change(self._early_stops, numpy.full(len(self._early_stops), -_LARGEST))
        return before


def _zeros(ids: Indices) -> Floats:
    return numpy.zeros(len(ids), numpy.float32)


def together(logits: torch.Tensor) -> bool:
    """Whether `choose_together` takes such logits; else they are worked on row by row, in numpy."""
    native = "cpu" in sample_tokens.backends and logits.is_cpu and logits.stride(-1) == 1
    return native and logits.dtype is torch.float32


def choose_together(
    samplers: Sequence[Sampler], logits: torch.Tensor, places: Sequence[int]
) -> list[int]:
    """The next token of each of one model's samplers, for `Sampler.remember`, from the row of
    logits [n, vocab_rows] at its place; NOT_FINITE where a number of it is none. A row has the same
    token as alone.
    """
    settings, ids, numbers, ends = [], [], [], [0]
    for sampler in samplers:
        rules, kinds = sampler.asks()
        settings.append(rules)
        if not kinds:
            ends += ends[-1:] * len(KINDS)
        for some, given in kinds:
            ends.append(ends[-1] + len(some))
            if len(some):
                ids.append(some)
                numbers.append(given)
    chosen: torch.Tensor = sample_tokens(
        torch.from_numpy(numpy.array(settings, numpy.float64)),  # quicker than of lists
        logits,
        torch.from_numpy(numpy.array(places, numpy.int64)),
        torch.from_numpy(numpy.concatenate(ids or _NOTHING[:1])),
        torch.from_numpy(numpy.concatenate(numbers or _NOTHING[1:])),
        torch.from_numpy(numpy.array(ends, numpy.int64)),
        min(samplers[0]._vocab_size, logits.shape[1]),
    )  # [rows]
    tokens: list[int] = chosen.tolist()
    return tokens


def penalize_repetition(scores: Floats, penalty: float) -> Floats:
    """Scores [n] made less likely by a factor: positive ones divided by `penalty`, negative ones
    multiplied.
    """
    with numpy.errstate(over="ignore", divide="ignore"):  # the ends of the range are as good
        changed = scores * penalty  # [n]
        numpy.divide(scores, penalty, out=changed, where=scores > 0)
    return changed.clip(-_LARGEST, _LARGEST)


def penalize_counts(scores: Floats, used: Floats, presence: float, frequency: float) -> Floats:
    """Scores [n] of ids that were output, minus `presence` and `frequency` for every time `used`
    [n].
    """
    return scores - presence - frequency * used


def candidates(
    scores: Floats, sampling: SamplingParams, maxima: Floats | None = None
) -> tuple[Indices | None, Floats]:
    """What temperature and filters leave of scores [vocab_size]: ids [n], or None for all of them
    in their order, and their weights [n]. `maxima` are `maxima_of(scores)`, if they are known.

    Weights are fp32 and proportional to probability; the heaviest is 1. At least one id is left.
    """
    ids: Indices | None = None
    bound = None  # what a score must reach
    if 0 < sampling.top_k < len(scores):
        maxima = maxima_of(scores) if maxima is None else maxima
        bound = scores[largest_ids(scores, sampling.top_k, maxima)].min()
        # What temperature makes equal to the bound is as large as it, and lies next to it.
        margin = 2**-20 * (abs(float(bound)) + abs(float(maxima.max()))) + 1e-36
        ids = at_least(scores, max(float(bound) - margin, -float(_LARGEST)), maxima)  # [n]
        scores = scores[ids]  # [n]
    with numpy.errstate(over="ignore"):  # to -inf, whose weight is 0
        largest, temperature = scores.max(), numpy.float32(max(sampling.temperature, _COLDEST))
        scaled = (scores - largest) / temperature  # [n]
        if bound is not None and ids is not None:
            kept = scaled >= (bound - largest) / temperature  # [n]
            ids, scaled = ids[kept], scaled[kept]  # [n]
    weights = numpy.exp(scaled, out=scaled)  # [n]
    if sampling.top_p < 1:
        order = _nucleus(weights, sampling.top_p)
        ids, weights = _of(ids, order), weights[order]  # [n]
    if sampling.min_p > 0:
        kept = numpy.flatnonzero(weights >= sampling.min_p * weights.max())
        ids, weights = _of(ids, kept), weights[kept]  # [n]
    return ids, weights


def _of(ids: Indices | None, places: Indices) -> Indices:
    return places if ids is None else ids[places]


def _nucleus(weights: Floats, top_p: float) -> Indices:
    """Indices of the fewest heaviest of `weights` [n] that together have at least `top_p` of their
    sum; the heaviest first, equal ones as they stand.

    What weighs less than (1 - top_p) · sum / n weighs less than (1 - top_p) · sum even if it is
    nearly everything, so the rest has the nucleus in it, and only that is sorted. The floor lies a
    little lower for the sake of rounding.
    """
    total = float(weights.sum(dtype=numpy.float64))
    floor = 0.99 * (1 - top_p) * total / len(weights)
    heavy = numpy.flatnonzero(weights >= floor)  # [m]
    order = heavy[_heaviest_first(weights[heavy])]  # [m]
    heaviest = weights[order]  # [m]
    before = heaviest.cumsum(dtype=numpy.float64) - heaviest  # [m]
    return order[: max(1, numpy.count_nonzero(before < top_p * total))]


def _heaviest_first(weights: Floats) -> Indices:
    """The stable order of `weights` [n], none of them negative.

    The bits of such numbers have the numbers' order, so one whole number holds a weight and, below
    it, its place: sorting these is several times faster than numpy's stable sort of floats.
    """
    lightness = ~weights.view(numpy.uint32)  # [n]
    keys = lightness.astype(numpy.uint64) << 32  # [n]
    keys |= numpy.arange(len(weights), dtype=numpy.uint64)
    keys.sort()
    return (keys & 0xFFFFFFFF).astype(numpy.int64)


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of the output token at `index`, of 52 random bits."""
    message = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    digest = hashlib.blake2b(message, digest_size=8, person=b"qwenkit-sample").digest()
    return (int.from_bytes(digest, "little") >> 12) / 2**52


def draw(weights: Floats, number: float) -> int:
    """The index at which the running sum of `weights` [n] passes `number` times their sum.

    An index of weight 0 is never drawn: the running sum does not grow there, and a number of 52
    bits below 1 leaves the product below the sum. The sum runs over stretches first and then within
    the one that it passes in, which is as exact and many times faster than number by number.
    """
    starts = numpy.arange(0, len(weights), _STRETCH)  # [stretches]
    ends = numpy.add.reduceat(weights, starts, dtype=numpy.float64).cumsum()  # [stretches]
    target = number * float(ends[-1])
    stretch = int(ends.searchsorted(target, side="right"))
    if stretch:
        target -= float(ends[stretch - 1])
    start = int(starts[stretch])
    running = weights[start : start + _STRETCH].cumsum(dtype=numpy.float64)  # [at most _STRETCH]
    # Sums taken in another order may differ in the last bit: what is left stays below this one.
    target = min(target, float(numpy.nextafter(running[-1], 0)))
    return start + int(running.searchsorted(target, side="right"))
