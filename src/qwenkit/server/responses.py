"""/v1/responses: the newer of OpenAI's two ways to ask for a turn. Nothing is stored."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.responses import Response

from qwenkit.errors import QwenkitError
from qwenkit.server.answers import check_finish, writer_of
from qwenkit.server.chat import Chat, prepared
from qwenkit.server.errors import ApiError, described
from qwenkit.server.facts import facts_of
from qwenkit.server.response_input import chat_fields
from qwenkit.server.response_items import Output, OutputEvent
from qwenkit.server.route import group
from qwenkit.server.served import Served
from qwenkit.server.sse import Streamed, compact, event, json_answer
from qwenkit.server.wire.base import read
from qwenkit.server.wire.chat import ChatRequest
from qwenkit.server.wire.responses import FunctionChoice, ResponsesAnswer, ResponsesRequest
from qwenkit.types.deltas import ContentDelta, ReplyDelta
from qwenkit.types.events import Event, FinishEvent, TokenEvent

router = group()
_REASONS = {"length": "max_output_tokens"}  # else as they are


@router.post(
    "/v1/responses", response_model=ResponsesAnswer, summary="The next turn, in OpenAI's newer way."
)
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Answers as one JSON object, or with `stream` as server-sent events."""
    served: Served = request.app.state.served
    asked = read(ChatRequest, chat_fields(body))
    chat = await prepared(asked, served, facts_of(request.scope), any_turns=True)
    answer = Answer(chat, body)
    if body.stream:
        pieces = _Events(answer).pieces()
        return _Stream(pieces, keep_alive_s=served.settings.keep_alive_s)
    try:
        async with chat.answers.running() as stream:
            async for batch in chat.answers.batches(stream):
                for _ in answer.take([one for _, one in batch]):
                    pass  # what is told of it is for streams
    except QwenkitError as error:
        raise described(error, "input") from error
    return json_answer(answer.content())


@dataclass(slots=True)
class Answer:
    """One answer as it comes."""

    chat: Chat
    body: ResponsesRequest
    output: Output = field(default_factory=Output)
    logprobs: list[Any] = field(default_factory=list)  # of tokens whose text is still to come
    status: str = "in_progress"
    reason: str | None = None
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def take(self, events: Sequence[Event]) -> Iterator[OutputEvent]:
        """Take what has come; the events that tell of it. Raises ApiError for a failed answer."""
        chat, reader = self.chat, self.chat.readers[0]
        if chat.body.logprobs:
            writer = writer_of(chat.served, chat.choices.sampling)
            self.logprobs += writer.entries(one for one in events if isinstance(one, TokenEvent))
        for one in events:
            if isinstance(one, FinishEvent):
                check_finish(one)
            for delta in reader.read(one).deltas:
                yield from self._push(delta)
            if isinstance(one, FinishEvent):
                if self.logprobs:  # of tokens without a text of their own
                    yield from self._push(ContentDelta(""))
                complete = one.reason == "stop"
                self.status = "completed" if complete else "incomplete"
                self.reason = None if complete else _REASONS.get(one.reason, one.reason)
                yield from self.output.close(self.status)

    def _push(self, delta: ReplyDelta) -> Iterator[OutputEvent]:
        logprobs: list[Any] = []
        if isinstance(delta, ContentDelta):
            logprobs, self.logprobs = self.logprobs, []
        yield from self.output.push(delta, logprobs)

    def content(self) -> dict[str, Any]:
        """The response object, as far as it is there."""
        body, sampling = self.body, self.chat.choices.sampling
        choice = body.tool_choice or "auto"
        form = None if body.text is None else body.text.format
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": self.status,
            "background": False,
            "error": None,
            "incomplete_details": None if self.reason is None else {"reason": self.reason},
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.chat.target.name,
            "output": self.output.content(),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"} if form is None else _dumped(form)},
            "tool_choice": _dumped(choice) if isinstance(choice, FunctionChoice) else choice,
            "tools": [_dumped(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None if self.status == "in_progress" else self._usage(),
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def _usage(self) -> dict[str, Any]:
        facts = self.chat.facts
        return {
            "input_tokens": facts.prompt_tokens,
            "input_tokens_details": {"cached_tokens": facts.cached_tokens},
            "output_tokens": facts.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": facts.prompt_tokens + facts.completion_tokens,
        }


class _Stream(Streamed):
    def as_piece(self, error: ApiError) -> bytes:
        """An error as an event of this API."""
        fields = {"code": error.code or error.kind, "message": error.message, "param": error.param}
        return event(compact({"type": "error", **fields}), "error")


class _Events:
    """Writes numbered events."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._number = 0

    async def pieces(self) -> AsyncGenerator[bytes]:
        """All of the stream."""
        answer, chat = self._answer, self._answer.chat
        try:
            async with chat.answers.running() as stream:
                begun = answer.content()
                yield self._event("response.created", {"response": begun})
                yield self._event("response.in_progress", {"response": begun})
                async for batch in chat.answers.batches(stream):
                    told = answer.take([one for _, one in batch])
                    yield b"".join(self._event(kind, fields) for kind, fields in told)
        except QwenkitError as error:
            raise described(error, "input") from error
        yield self._event(f"response.{answer.status}", {"response": answer.content()})

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        number, self._number = self._number, self._number + 1
        return event(compact({"type": kind, "sequence_number": number, **fields}), kind)


def _dumped(part: Any) -> dict[str, Any]:
    dumped: dict[str, Any] = part.model_dump(exclude_none=True, by_alias=True)
    return dumped
