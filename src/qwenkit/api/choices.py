"""Several answers to one prompt, and the best of more."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwenkit.api.inputs import MakeRequest, Options, Prompt
from qwenkit.engine.request import Request
from qwenkit.errors import RequestError
from qwenkit.types.completion import Completion
from qwenkit.types.sampling import SamplingParams, whole_number

MOST_CHOICES = 128
_SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class Choices:
    """`n` answers under `sampling`, whose seed is known; with `best_of` those of so many that have
    the highest mean log-probability.

    Raises RequestError naming the field on construction.
    """

    sampling: SamplingParams
    n: int
    best_of: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole_number("n", self.n, 1, MOST_CHOICES))
        if self.best_of is None:
            return
        best_of = whole_number("best_of", self.best_of, 1, MOST_CHOICES)
        object.__setattr__(self, "best_of", best_of)
        if best_of < self.n:
            raise RequestError("best_of", f"{best_of} answers are fewer than n {self.n}.")

    def candidates(self) -> list[SamplingParams]:
        """The sampling of each answer to ask for: the seed, the next one, and so on."""
        seed, logprobs = self.sampling.seed, self.sampling.logprobs
        assert seed is not None, "a seed is drawn for every request"
        if self.best_of is not None and logprobs is None:
            logprobs = 0  # to judge by; they do not change what is sampled
        return [
            self.sampling.replace(seed=(seed + number) % _SEEDS, logprobs=logprobs)
            for number in range(self.best_of or self.n)
        ]

    def requests(self, make: MakeRequest, prompt: Prompt, options: Options) -> list[Request]:
        """A request for each candidate."""
        first, *others = self.candidates()
        request = make(prompt, first, options)
        return [
            request,
            *(replace(request, id=secrets.token_hex(8), sampling=other) for other in others),
        ]

    def chosen(self, done: Sequence[Completion]) -> list[Completion]:
        """The answers to give, of those to `candidates` in their order: with `best_of` the best
        first, else all as they are. Each is what its sampling gives when it is asked alone.
        """
        best = [done[index] for index in self.ranked([_mean_logprob(one) for one in done])]
        if self.best_of is not None and self.sampling.logprobs is None:
            best = [replace(completion, logprobs=None) for completion in best]
        return best

    def ranked(self, means: Sequence[float]) -> list[int]:
        """The places of those answers among the candidates, by what their tokens' log-probabilities
        are in the mean.
        """
        places = range(len(means))
        if self.best_of is None:
            return list(places)
        return sorted(places, key=lambda place: -means[place])[: self.n]


def _mean_logprob(done: Completion) -> float:
    """Of the output's tokens; a failed answer comes last."""
    total = done.cumulative_logprob
    if total is None or not done.token_ids or done.finish_reason in ("error", "abort"):
        return -math.inf
    return total / len(done.token_ids)
