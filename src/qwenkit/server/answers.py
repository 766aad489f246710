"""From a request's fields to events of the engine, the same for all endpoints that give text."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from qwenkit.api.choices import Choices
from qwenkit.engine.request import Request
from qwenkit.engine.service import AsyncEventStream
from qwenkit.errors import RequestError
from qwenkit.server.errors import ApiError, described
from qwenkit.server.facts import Facts
from qwenkit.server.logprobs import LogprobWriter
from qwenkit.server.served import SHUTTING_DOWN, Served, Target
from qwenkit.server.wire.generation import GenerationFields
from qwenkit.types.events import Event, FinishEvent, TokenEvent
from qwenkit.types.options import RequestOptions
from qwenkit.types.sampling import SamplingParams

MOST_ENTRIES = 2_000_000  # of log-probabilities in an answer that is sent whole


class Asking(Protocol):
    """The fields that say whose request it is and how urgent."""

    @property
    def priority(self) -> int | None: ...
    @property
    def timeout_s(self) -> float | None: ...
    @property
    def cache_salt(self) -> str | None: ...


def request_options(
    served: Served, given: Asking, facts: Facts, target: Target, user: str | None
) -> RequestOptions:
    """Whose request it is and how urgent. Raises ApiError.

    A client is a key and a user. Nobody's prompts are found in the cache by another key.
    """
    if given.priority is not None and given.priority > 0 and not served.settings.allow_priority:
        raise ApiError(
            400,
            "priority: above 0 a request would go before those of other clients, which this server "
            "does not allow; start it with --allow-priority, or give 0 or less.",
            "priority",
            "unsupported_value",
        )
    facts.client = f"{facts.client}/{user}" if user else facts.client
    return RequestOptions(
        client=facts.client,
        priority=given.priority or 0,
        timeout_s=given.timeout_s,
        cache_salt=f"{facts.key}\0{given.cache_salt}" if given.cache_salt else facts.key,
        adapter=target.adapter,
    )


def choices_of(served: Served, given: GenerationFields, sampling: object) -> Choices:
    """How many answers, and how each is sampled. Raises ApiError, RequestError."""
    settings = served.settings
    n = 1 if given.n is None else given.n
    for field, asked in (("n", n), ("best_of", given.best_of)):
        if asked is not None and asked > settings.max_choices:
            message = f"{field}: got {asked}; this server gives at most {settings.max_choices}."
            raise ApiError(400, message, field, "invalid_value")
    if given.stream and given.best_of is not None and given.best_of > n:
        raise ApiError(
            400,
            "best_of: the best answers are known at the end only, so they cannot be streamed.",
            "best_of",
            "invalid_value",
        )
    return Choices(served.llm.sampling(sampling), n, given.best_of)  # type: ignore[arg-type]


@dataclass(slots=True)
class Answers:
    """The answers that are computed to one HTTP request: an engine's request for each.

    `prompts` says, for each request, to which prompt of the HTTP request it belongs.
    """

    served: Served
    facts: Facts
    requests: Sequence[Request]
    prompts: Sequence[int]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[AsyncEventStream]:
        """Submit all; on the way out, what has not finished is aborted.

        Raises ApiError when there is no room, RequestError when one cannot be served.
        """
        with self.served.admitted(self.facts.client, len(self.requests)):
            stream = await self.served.submit(self.facts.client, self.requests)
            try:
                yield stream
            finally:
                stream.abort()

    async def batches(self, stream: AsyncEventStream) -> AsyncIterator[list[tuple[int, Event]]]:
        """What has come since the last time, as (place of the request, event); never empty."""
        places = {request.id: place for place, request in enumerate(self.requests)}
        counted: set[int] = set()
        while events := await stream.ready():
            if self.facts.first_token_s is None and any(isinstance(e, TokenEvent) for e in events):
                self.facts.saw_token()
            for event in events:
                if isinstance(event, FinishEvent):
                    prompt = self.prompts[places[event.request_id]]
                    self.facts.count(event.usage, new_prompt=prompt not in counted)
                    self.facts.finish += (event.reason,)
                    counted.add(prompt)
            yield [(places[event.request_id], event) for event in events]


class Tally:
    """What is to be known of one answer at its end, without keeping its tokens."""

    def __init__(self) -> None:
        self._logprob_sum = 0.0
        self._tokens = 0
        self._finish: FinishEvent | None = None

    def push(self, event: Event) -> None:
        """Take an event. Raises ApiError for an answer that failed."""
        if isinstance(event, FinishEvent):
            check_finish(event)
            self._finish = event
        elif isinstance(event, TokenEvent) and event.logprob is not None:
            self._logprob_sum += event.logprob
            self._tokens += 1

    @property
    def finish(self) -> FinishEvent:
        """The last event; it must have come."""
        assert self._finish is not None, "every accepted request ends in a FinishEvent"
        return self._finish

    @property
    def mean_logprob(self) -> float:
        """Of its tokens; the lowest where there are none."""
        return self._logprob_sum / self._tokens if self._tokens else -math.inf


def check_logprobs(served: Served, requests: Sequence[Request], *, streamed: bool) -> None:
    """Raises ApiError for a whole answer that could have more entries of log-probabilities than fit
    in memory together; a stream keeps none.
    """
    if streamed or not requests or requests[0].sampling.logprobs is None:
        return
    tokens = sum(served.llm.output_tokens(request) for request in requests)
    entries = tokens * (requests[0].sampling.logprobs + 1)
    if entries > MOST_ENTRIES:
        raise ApiError(
            400,
            f"logprobs: this answer could have {entries:,} of them; at most {MOST_ENTRIES:,} come "
            "whole. Lower max_tokens, n or the number of alternatives, or stream it.",
            "logprobs",
            "invalid_value",
        )


def check_finish(event: FinishEvent) -> None:
    """Raises ApiError for an answer that failed, or that the server's end cut off."""
    if event.reason == "error":
        raise failed(event)
    if event.reason == "abort":
        raise ApiError(503, SHUTTING_DOWN, code="shutting_down")


def failed(event: FinishEvent) -> ApiError:
    """What is said of an answer that ended with an error."""
    message = event.error or "the engine failed"
    if message == SHUTTING_DOWN:
        return ApiError(503, SHUTTING_DOWN, code="shutting_down")
    if message.startswith("RequestError: "):  # found where the request was run
        name, _, reason = message.removeprefix("RequestError: ").partition(": ")
        return described(RequestError(name, reason))
    return ApiError(500, f"The answer failed: {message}", code="engine_error")


def writer_of(served: Served, sampling: SamplingParams) -> LogprobWriter:
    """Writes the log-probabilities of answers that are sampled so."""
    model_stops = () if sampling.ignore_eos else served.llm.record.stop_token_ids
    return LogprobWriter(served.llm.tokenizer, {*model_stops, *sampling.stop_token_ids})


def stop_reason(
    sampling: SamplingParams, reason: str, matched: str | int | None
) -> dict[str, str | int]:
    """The stop string or token that a request named and that ended its answer, as a field."""
    named = matched in sampling.stop or matched in sampling.stop_token_ids
    return {"stop_reason": matched} if reason == "stop" and named and matched is not None else {}
