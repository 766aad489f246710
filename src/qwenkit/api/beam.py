"""Beam search: the likeliest continuations, looked for among several at a time.

Left to right with a fixed number of open continuations (arXiv 1409.3215), ended and scored as in
transformers. The search knows no model and waits for nothing: `open` says which continuations are
asked for, `advance` takes what may come next. Each step is a request of one token for each of them,
so that a prefix cache has all the rest already.
"""

from __future__ import annotations

import heapq
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qwenkit.engine.request import Limits, Request, check_request, stop_ids
from qwenkit.errors import QwenkitError, RequestError
from qwenkit.types.completion import BeamCompletion, Completion
from qwenkit.types.events import FinishReason
from qwenkit.types.protocols import Tokenizer
from qwenkit.types.record import ModelRecord
from qwenkit.types.sampling import SamplingParams, number_between, whole_number

MOST_BEAMS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSettings:
    """How to search.

    `width` continuations are open at a time and as many answers come out. Above 0 the
    `length_penalty` favours long answers, below 0 short ones. With `early_stopping` the search is
    over as soon as it has `width` answers that ended by themselves, else when the best open
    continuation, if it ended now, would be no better than the worst of them.

    Raises RequestError naming the field on construction.
    """

    width: int
    max_tokens: int
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", whole_number("width", self.width, 1, MOST_BEAMS))
        object.__setattr__(self, "max_tokens", whole_number("max_tokens", self.max_tokens, 1))
        penalty = number_between("length_penalty", self.length_penalty, -10.0, 10.0)
        object.__setattr__(self, "length_penalty", penalty)
        if not isinstance(self.early_stopping, bool):
            raise RequestError(
                "early_stopping", f"expected true or false, got {self.early_stopping!r}."
            )


@dataclass(frozen=True, slots=True)
class _Beam:
    """New tokens and the sum of their log-probabilities."""

    token_ids: tuple[int, ...]
    logprob: float


@dataclass(frozen=True, slots=True)
class _Answer:
    beam: _Beam
    score: float
    reason: FinishReason


class BeamSearch:
    """One search. `stop_ids` end a continuation, each mapped to what is reported for it; `most` is
    how many alternatives one step can have at all, the size of the vocabulary.
    """

    def __init__(
        self, settings: BeamSettings, *, stop_ids: Mapping[int, str | int], most: int
    ) -> None:
        self._settings = settings
        self._stop_ids = stop_ids
        # A beam loses at most one alternative to each stop: so many leave `width` to go on with.
        self._ranked = max(2, 1 + len(stop_ids)) * settings.width
        self.alternatives = min(self._ranked, most)
        self._open = [_Beam((), 0.0)]
        self._answers: list[_Answer] = []  # best first

    @property
    def open(self) -> tuple[tuple[int, ...], ...]:
        """The new tokens of every open continuation, the likeliest first; none: it is over."""
        return tuple(beam.token_ids for beam in self._open)

    def advance(self, alternatives: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Take the `self.alternatives` likeliest next tokens (id, logprob) of each of `open`."""
        width = self._settings.width
        longer = (
            _Beam((*beam.token_ids, token_id), beam.logprob + logprob)
            for beam, likely in zip(self._open, alternatives, strict=True)
            for token_id, logprob in likely
        )
        best = heapq.nlargest(self._ranked, longer, key=lambda beam: beam.logprob)
        is_last = len(best[0].token_ids) == self._settings.max_tokens
        for beam in best[:width]:  # what stops but ranks lower is dropped
            if beam.token_ids[-1] in self._stop_ids:
                self._keep(beam, "stop")
            elif is_last:
                self._keep(beam, "length")
        going_on = [beam for beam in best if beam.token_ids[-1] not in self._stop_ids]
        self._open = [] if is_last or self._is_settled(going_on) else going_on[:width]

    def results(self, tokenizer: Tokenizer) -> list[BeamCompletion]:
        """The answers found, the best first."""
        return [self._completion(answer, tokenizer) for answer in self._answers]

    def _keep(self, beam: _Beam, reason: FinishReason) -> None:
        """Put an answer to its place among the `width` best."""
        answer = _Answer(beam, self._score(beam), reason)
        answers = sorted([*self._answers, answer], key=lambda a: -a.score)
        self._answers = answers[: self._settings.width]

    def _is_settled(self, going_on: Sequence[_Beam]) -> bool:
        """True when no continuation, the likeliest first, is expected to change the answers."""
        if not going_on:
            return True
        if len(self._answers) < self._settings.width:
            return False
        if self._settings.early_stopping:
            return True
        return self._score(going_on[0]) <= self._answers[-1].score

    def _score(self, beam: _Beam) -> float:
        return beam.logprob / math.pow(len(beam.token_ids), self._settings.length_penalty)

    def _completion(self, answer: _Answer, tokenizer: Tokenizer) -> BeamCompletion:
        ids = answer.beam.token_ids
        stopped = answer.reason == "stop"
        stream = tokenizer.stream()
        text = "".join(map(stream.push, ids[:-1] if stopped else ids)) + stream.finish()
        return BeamCompletion(
            token_ids=ids,
            text=text,
            score=answer.score,
            cumulative_logprob=answer.beam.logprob,
            finish_reason=answer.reason,
            matched_stop=self._stop_ids[ids[-1]] if stopped else None,
        )


def step_requests(search: BeamSearch, request: Request) -> list[Request]:
    """What to ask for the next step of a search that continues `request`: one token after each open
    continuation, with its likeliest alternatives.
    """
    sampling = SamplingParams(
        max_tokens=1, temperature=0.0, seed=0, ignore_eos=True, logprobs=search.alternatives
    )
    return [
        Request(secrets.token_hex(8), (*request.prompt_ids, *ids), sampling, request.options)
        for ids in search.open
    ]


def likeliest(done: Completion) -> tuple[tuple[int, float], ...]:
    """The alternatives that a step's request found. Raises QwenkitError when it found none."""
    if not done.logprobs:
        cause = f"{done.finish_reason}: {done.error}" if done.error else done.finish_reason
        raise QwenkitError(f"the beam search ended early: {cause}.")
    return done.logprobs[0].top


def start_search(
    request: Request,
    settings: BeamSettings,
    limits: Limits,
    record: ModelRecord,
    tokenizer: Tokenizer,
) -> BeamSearch:
    """A search for continuations of a request's prompt; its sampling says where an answer ends.

    Raises RequestError for a request that an engine with these limits cannot take.
    """
    check_request(request, limits)
    return BeamSearch(
        replace(settings, max_tokens=limits.output_tokens(request)),
        stop_ids=stop_ids(request.sampling, record.stop_token_ids, tokenizer.control_tokens),
        most=limits.vocab_size,
    )
