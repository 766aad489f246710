"""What an engine keeps of an accepted request beside its sequence: how rows become events."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from qwenkit.engine.constrain import Matcher
from qwenkit.engine.logprobs import prompt_logprobs
from qwenkit.engine.plan import Chunk, Plan
from qwenkit.engine.pooling import Pooler
from qwenkit.engine.request import Limits, Request
from qwenkit.engine.runner import Rows
from qwenkit.engine.sampler import NOT_FINITE, Choice, Sampler, choose_together, together
from qwenkit.engine.text import Ending, Output
from qwenkit.errors import NonFiniteError, QwenkitError
from qwenkit.types.events import FinishEvent, PromptEvent, TokenEvent, Usage
from qwenkit.types.protocols import Tokenizer

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Taken:
    """What came of a chunk's rows: events, the new tokens, and whether the request ends so."""

    events: list[PromptEvent | TokenEvent] = field(default_factory=list)
    token_ids: tuple[int, ...] = ()
    ending: Ending | None = None


class Active:
    """One request; `deadline_s` is by the engine's clock, the seed of its sampling is known."""

    def __init__(
        self,
        request: Request,
        limits: Limits,
        tokenizer: Tokenizer,
        *,
        stop_ids: Mapping[int, str | int],
        matcher: Matcher | None,
        deadline_s: float | None,
    ) -> None:
        sampling = request.sampling
        assert sampling.seed is not None, "a seed is drawn for every request"
        self.request = request
        self.deadline_s = deadline_s
        self.extension = limits.extension(request)
        self.output = Output(
            tokenizer.stream(),
            sampling,
            stop_ids=stop_ids,
            max_tokens=limits.output_tokens(request),
        )
        self._sampler = Sampler(
            sampling,
            prompt_ids=request.prompt_ids,
            seed=sampling.seed,
            vocab_size=limits.vocab_size,
            stop_ids=stop_ids,
        )
        self._matcher = matcher
        self._pooler = None if request.embedding is None else Pooler(request.embedding)
        self._vocab_size = limits.vocab_size
        plain = request.embedding is None and request.scored_from is None
        self._joins = plain and matcher is None and sampling.logprobs is None

    @property
    def computed_ids(self) -> tuple[int, ...]:
        """The tokens to compute before the first one is sampled. The last one that is scored needs
        no row of its own.
        """
        ids = self.request.prompt_ids
        return ids if self.request.scored_from is None else ids[:-1]

    @property
    def rows_from(self) -> int | None:
        """The first of these tokens whose row is wanted; None: only the last one's."""
        request = self.request
        if request.scored_from is not None:
            return request.scored_from - 1
        pools_all = request.embedding is not None and request.embedding.pooling == "mean"
        return 0 if pools_all or request.sampling.prompt_logprobs is not None else None

    def sampler_of(self, chunk: Chunk) -> Sampler | None:
        """What samples from a chunk's row, if there is one only, which is for nothing else: then it
        can be chosen together with others'.
        """
        sole = chunk.sample and chunk.rows == 1 and self._joins and self._sampler.joins
        return self._sampler if sole else None

    def take(
        self, chunk: Chunk, rows_of: Callable[[], torch.Tensor], token_id: int | None = None
    ) -> Taken:
        """Make of the rows of a chunk, [chunk.rows, vocab_size], or of a request to be embedded
        [chunk.rows, hidden_size], what the request is for. `token_id` is what `chosen_together`
        chose from them, if it did: then nobody looks at them.
        """
        taken = Taken()
        if token_id is not None:
            self._push(self._sampler.remember(token_id), taken)
            return taken
        rows = rows_of()
        first = chunk.start + len(chunk.token_ids) - chunk.rows
        if self._pooler is not None:
            if len(rows):
                self._pooler.add(first, rows)
            return Taken(ending=Ending("stop") if chunk.sample else None)
        samples = chunk.sample and self.request.scored_from is None
        known = len(rows) - chunk.drafted - 1 if samples else len(rows)
        if known:
            taken.events.append(self._report_prompt(first + 1, rows[:known]))
        if samples:
            self._sample(chunk, rows[known:], taken)
        elif chunk.sample:
            taken.ending = Ending("stop")
        return taken

    def finish(self, ending: Ending, *, error: str | None, cached_tokens: int) -> FinishEvent:
        """The last event, with what was still held back."""
        embedding = None
        try:
            text, ending = self.output.finish(ending)
            if self._pooler is not None and ending.reason == "stop":
                embedding = self._pooler.result()
        except Exception as failure:  # of the tokenizer's stream, or a vector that is not finite
            text, ending, error = "", Ending("error"), error or describe(failure)
        return FinishEvent(
            request_id=self.request.id,
            reason=ending.reason,
            text=text,
            usage=Usage(
                prompt_tokens=len(self.request.prompt_ids),
                completion_tokens=self.output.tokens,
                cached_tokens=cached_tokens,
                extension=self.extension,
            ),
            matched_stop=ending.matched_stop,
            error=error,
            embedding=embedding,
        )

    def _report_prompt(self, start: int, rows: torch.Tensor) -> PromptEvent:
        """Of rows [tokens, vocab_size] of the tokens before those from `start` on."""
        ids = self.request.prompt_ids[start : start + len(rows)]
        entries = prompt_logprobs(
            rows,
            ids,
            count=self.request.sampling.prompt_logprobs or 0,
            vocab_size=self._vocab_size,
            start=start,
        )
        if start == 1 and self.request.scored_from is None:
            return PromptEvent(self.request.id, 0, (None, *entries))
        return PromptEvent(self.request.id, start, entries)

    def _sample(self, chunk: Chunk, rows: torch.Tensor, taken: Taken) -> None:
        """Tokens from rows [drafted + 1, vocab_size], up to the first that is not what was drafted,
        or ends the output.
        """
        drafted = chunk.token_ids[len(chunk.token_ids) - chunk.drafted :]
        for row, guess in zip(rows, (*drafted, None), strict=True):
            try:
                choice = self._choose(row)
            except NonFiniteError:
                if chunk.drafted:  # a guess may have done that: it is asked again without any
                    return
                raise
            self._push(choice, taken)
            if taken.ending is not None or choice.token_id != guess:
                return

    def _push(self, choice: Choice, taken: Taken) -> None:
        text, taken.ending = self.output.push(choice.token_id)
        taken.token_ids += (choice.token_id,)
        taken.events.append(
            TokenEvent(self.request.id, choice.token_id, text, choice.logprob, choice.top_logprobs)
        )

    def _choose(self, row: torch.Tensor) -> Choice:
        """The next token, from logits [vocab_rows], as sampling and constraint have it."""
        if self._matcher is None:
            return self._sampler.choose(row)
        choice = self._sampler.choose(row, self._matcher.mask())
        self._matcher.consume(choice.token_id)
        return choice


def chosen_together(active: Mapping[str, Active], plan: Plan, rows: Rows) -> dict[str, int]:
    """The next token of every request of a plan whose row can be chosen from together with
    others'; of none whose row is not finite, which `Active.take` reports.
    """
    if not plan.chunks or not together(rows.logits):
        return {}
    names, samplers, places, end = [], [], [], 0
    for chunk in plan.chunks:
        if chunk.hidden:
            continue
        end += chunk.rows
        sampler = active[chunk.request_id].sampler_of(chunk)
        if sampler is not None:
            names.append(chunk.request_id)
            samplers.append(sampler)
            places.append(end - 1)
    chosen = choose_together(samplers, rows.logits, places) if places else []
    return {name: id_ for name, id_ in zip(names, chosen, strict=True) if id_ != NOT_FINITE}


def describe(error: Exception) -> str:
    """An error as its request is told it."""
    if not isinstance(error, QwenkitError):  # a fault of the program: keep the trace
        _log.error("a request failed", exc_info=error)
    return f"{type(error).__name__}: {error}"
