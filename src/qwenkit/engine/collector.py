"""A request's events as one answer, with the times at which they came."""

from __future__ import annotations

import time

from qwenkit.engine.request import Request
from qwenkit.types.completion import Completion, Timing
from qwenkit.types.events import Event, FinishEvent, PromptEvent, TokenEvent, TokenLogprob


class Collector:
    """Gathers one request's events into a Completion; times count from its making."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._prompt: list[TokenLogprob | None] = []
        self._tokens: list[TokenEvent] = []
        self._finish: FinishEvent | None = None
        self._start_s = time.perf_counter()
        self._first_s: float | None = None
        self._end_s = self._start_s

    def add(self, event: Event) -> None:
        """Take the next event, at the time it comes."""
        self._end_s = time.perf_counter()
        if isinstance(event, FinishEvent):
            self._finish = event
            return
        if isinstance(event, PromptEvent):
            self._prompt += event.logprobs
            return
        self._tokens.append(event)
        if self._first_s is None:
            self._first_s = self._end_s

    def completion(self) -> Completion:
        """The whole answer; its finish event must have come."""
        finish = self._finish
        assert finish is not None, "every accepted request ends in a FinishEvent"
        first_s = self._end_s if self._first_s is None else self._first_s
        seed = self._request.sampling.seed
        assert seed is not None, "a seed is drawn for every request"
        asked = self._request.sampling.prompt_logprobs
        return Completion(
            prompt_token_ids=self._request.prompt_ids,
            token_ids=tuple(t.token_id for t in self._tokens),
            text="".join(t.text for t in self._tokens) + finish.text,
            finish_reason=finish.reason,
            usage=finish.usage,
            seed=seed,
            timing=Timing(
                prompt_tokens=finish.usage.prompt_tokens,
                completion_tokens=finish.usage.completion_tokens,
                first_token_s=first_s - self._start_s,
                total_s=self._end_s - self._start_s,
                cached_tokens=finish.usage.cached_tokens,
            ),
            matched_stop=finish.matched_stop,
            logprobs=self._logprobs(),
            error=finish.error,
            prompt_logprobs=None if asked is None else tuple(self._prompt),
        )

    def _logprobs(self) -> tuple[TokenLogprob, ...] | None:
        if self._request.sampling.logprobs is None:
            return None
        return tuple(
            TokenLogprob(t.token_id, t.logprob, t.top_logprobs or ())
            for t in self._tokens
            if t.logprob is not None
        )
