"""Logits to one token, by one request's own rules.

Repetition penalty as in CTRL (arXiv 1909.05858), presence and frequency penalties by OpenAI's
formula, nucleus sampling (arXiv 1904.09751), min-p (arXiv 2407.01082); penalties, then temperature,
top-k, top-p and min-p, with the meaning that transformers gives them.

Nothing here sees another request: a row is worked on alone, and the random number of an output
token depends on nothing but the request's seed and the token's place in the output. So a seed gives
the same tokens in any batch, in any chunking and after any preemption, if the logits are the same.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy
import torch

from qwenkit.errors import NonFiniteError
from qwenkit.types.sampling import SamplingParams

_LARGEST = torch.finfo(torch.float32).max  # so that no penalty makes a score infinite
_COLDEST = 1e-6  # fp32 scores divided by less could overflow; this is greedy but for exact ties
_NUCLEUS_GUESS = 1024  # a nucleus is rarely larger; a larger one costs a full sort


@dataclass(frozen=True, slots=True)
class Choice:
    """A sampled token; the log-probabilities as in `TokenEvent`."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None


class Sampler:
    """Chooses one request's tokens one after another and remembers what its penalties need.

    Ids from `vocab_size` on are rows that pad the model's matrix and are never chosen. `stop_ids`
    are those that `min_tokens` puts off.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        prompt_ids: Iterable[int],
        seed: int,
        vocab_size: int,
        stop_ids: Iterable[int],
        device: torch.device,
    ) -> None:
        self._sampling = sampling
        self._seed = seed
        self._vocab_size = vocab_size
        self._length = 0
        self._output_counts: Counter[int] = Counter()
        self._seen = set(prompt_ids) if sampling.repetition_penalty != 1 else set()
        self._seen_ids = torch.tensor(sorted(self._seen), dtype=torch.int64, device=device)
        early_stops = sorted(stop_ids) if sampling.min_tokens else []
        self._early_stops = torch.tensor(early_stops, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor) -> Choice:
        """The next token, from logits [vocab_rows] of any float dtype.

        Raises NonFiniteError when one of them is no finite number: nothing sensible can be chosen.
        """
        logits = logits.to(torch.float32)  # [vocab_rows]
        if not _all_finite(logits):
            bad = logits.numel() - int(torch.isfinite(logits).sum())
            raise NonFiniteError(
                f"{bad} of the model's {logits.numel()} logits for output token {self._length} are "
                "NaN or infinite, so no token was chosen. Weights that overflow the compute dtype "
                "do this: try float32."
            )
        scores = self._adjust(logits[: self._vocab_size])  # [vocab_size]
        if self._sampling.greedy:
            token_id = _argmax(scores)
        else:
            ids, weights = candidates(scores, self._sampling)
            token_id = int(ids[draw(weights, uniform(self._seed, self._length))])
        self._remember(token_id)
        if self._sampling.logprobs is None:
            return Choice(token_id)
        return self._report(logits, token_id, self._sampling.logprobs)

    def _adjust(self, scores: torch.Tensor) -> torch.Tensor:
        sampling = self._sampling
        if sampling.repetition_penalty != 1 and self._seen:
            scores = penalize_repetition(scores, self._seen_ids, sampling.repetition_penalty)
        if self._output_counts:
            scores = penalize_counts(
                scores, self._output_counts, sampling.presence_penalty, sampling.frequency_penalty
            )
        if self._length < sampling.min_tokens and self._early_stops.numel():
            scores = scores.index_fill(0, self._early_stops, -torch.inf)
        return scores

    def _remember(self, token_id: int) -> None:
        self._length += 1
        if self._sampling.presence_penalty or self._sampling.frequency_penalty:
            self._output_counts[token_id] += 1
        if self._sampling.repetition_penalty != 1 and token_id not in self._seen:
            self._seen.add(token_id)
            self._seen_ids = torch.cat((self._seen_ids, self._seen_ids.new_tensor([token_id])))

    def _report(self, logits: torch.Tensor, token_id: int, count: int) -> Choice:
        total = torch.logsumexp(logits, 0)
        best = (logits[: self._vocab_size] - total).topk(count)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Choice(token_id, float(logits[token_id] - total), tuple(pairs))


# torch works on more than 32,768 numbers with all its threads, and waking those takes longer than
# this does; numpy stays in the thread it is called from.
def _all_finite(logits: torch.Tensor) -> bool:
    if logits.device.type != "cpu":
        return bool(torch.isfinite(logits).all())
    return bool(numpy.isfinite(logits.numpy()).all())


def _argmax(scores: torch.Tensor) -> int:
    return int(scores.argmax() if scores.device.type != "cpu" else scores.numpy().argmax())


def penalize_repetition(scores: torch.Tensor, ids: torch.Tensor, penalty: float) -> torch.Tensor:
    """Scores [vocab_size] with those of `ids` [n] made less likely by a factor: positive ones
    divided by `penalty`, negative ones multiplied.
    """
    chosen = scores[ids]  # [n]
    chosen = torch.where(chosen > 0, chosen / penalty, chosen * penalty)  # [n]
    return scores.index_copy(0, ids, chosen.clamp(-_LARGEST, _LARGEST))


def penalize_counts(
    scores: torch.Tensor, counts: Counter[int], presence: float, frequency: float
) -> torch.Tensor:
    """Scores [vocab_size], minus `presence` for every id of `counts` and `frequency` for every time
    it was used.
    """
    ids = torch.tensor(list(counts), device=scores.device)  # [n]
    used = torch.tensor(list(counts.values()), dtype=scores.dtype, device=scores.device)  # [n]
    return scores.index_copy(0, ids, scores[ids] - presence - frequency * used)


def candidates(scores: torch.Tensor, sampling: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """What temperature and filters leave of scores [vocab_size]: ids [n] and their weights [n].

    Weights are fp32 and proportional to probability; the heaviest is 1. At least one id is left.
    """
    scaled = (scores - scores.max()) / max(sampling.temperature, _COLDEST)  # [vocab_size]
    if 0 < sampling.top_k < len(scores):
        ids = (scaled >= scaled.topk(sampling.top_k).values[-1]).nonzero()[:, 0]  # [n], ties kept
        scaled = scaled[ids]  # [n]
    else:
        ids = torch.arange(len(scores), device=scores.device)  # [n]
    weights = scaled.exp()  # [n]
    if sampling.top_p < 1:
        order = _nucleus(weights, sampling.top_p)
        ids, weights = ids[order], weights[order]  # [n]
    if sampling.min_p > 0:
        kept = weights >= sampling.min_p * weights.max()
        ids, weights = ids[kept], weights[kept]  # [n]
    return ids, weights


def _nucleus(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """Indices of the fewest heaviest weights that together have at least `top_p` of the mass."""
    mass = top_p * weights.sum(dtype=torch.float64)
    size = min(_NUCLEUS_GUESS, len(weights))
    while True:
        heaviest, order = weights.topk(size)  # [size], heaviest first
        before = heaviest.cumsum(0, dtype=torch.float64) - heaviest  # [size]
        if size == len(weights) or before[-1] >= mass:
            return order[: max(1, int((before < mass).sum()))]
        size = len(weights)


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of the output token at `index`, of 52 random bits."""
    message = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    digest = hashlib.blake2b(message, digest_size=8, person=b"qwenkit-sample").digest()
    return (int.from_bytes(digest, "little") >> 12) / 2**52


def draw(weights: torch.Tensor, number: float) -> int:
    """The index at which the running sum of `weights` [n] passes `number` times their sum.

    An index of weight 0 is never drawn: the running sum does not grow there, and a number of 52
    bits below 1 leaves the product below the sum.
    """
    running = weights.cumsum(0, dtype=torch.float64)  # [n]
    return int(torch.searchsorted(running, number * running[-1], right=True))
