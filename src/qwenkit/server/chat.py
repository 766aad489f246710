"""/v1/chat/completions: the assistant's next turn."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from starlette.responses import Response

from qwenkit.api.choices import Choices
from qwenkit.api.replies import PreparedReply, ReplyReader, reply_sampling
from qwenkit.engine.service import AsyncEventStream
from qwenkit.errors import QwenkitError
from qwenkit.server import chat_tools, conversation
from qwenkit.server.answers import (
    Answers,
    Tally,
    check_finish,
    check_logprobs,
    choices_of,
    request_options,
    stop_reason,
    writer_of,
)
from qwenkit.server.chat_reply import ChatReply
from qwenkit.server.errors import ApiError, described
from qwenkit.server.facts import Facts, facts_of
from qwenkit.server.route import group
from qwenkit.server.served import Served, Target
from qwenkit.server.sse import DONE, Json, Streamed, compact, event, json_answer, json_text
from qwenkit.server.usage import usage_of
from qwenkit.server.wire.chat import ChatAnswer, ChatRequest, JsonObjectFormat, TextFormat
from qwenkit.server.wire.generation import check_stream_options, sampling_changes
from qwenkit.types.events import Event, FinishEvent, TokenEvent

router = group()


@dataclass(slots=True)
class Chat:
    """One request, ready to run."""

    served: Served
    facts: Facts
    body: ChatRequest
    target: Target
    choices: Choices
    answers: Answers
    readers: list[ReplyReader]
    usage_in_stream: bool
    id: str
    created: int

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that stand before the choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.target.name,
            "system_fingerprint": self.served.fingerprint,
        }

    def reply(self) -> ChatReply:
        """An empty answer."""
        return ChatReply(legacy=bool(self.body.functions))


@router.post(
    "/v1/chat/completions",
    response_model=ChatAnswer,
    summary="The assistant's next turn in a conversation.",
)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answers as one JSON object, or with `stream` as server-sent events."""
    chat = await prepared(body, request.app.state.served, facts_of(request.scope))
    if body.stream:
        keep_alive_s = chat.served.settings.keep_alive_s
        return Streamed(stream_pieces(chat), keep_alive_s=keep_alive_s)
    try:
        async with chat.answers.running() as stream:
            return json_answer(await answer(chat, stream))
    except QwenkitError as error:
        raise described(error) from error


async def prepared(
    body: ChatRequest, served: Served, facts: Facts, *, any_turns: bool = False
) -> Chat:
    """Everything up to the engine; for `any_turns` see `library_messages`. Raises ApiError."""
    target = served.target(body.model)
    facts.model, facts.stream = target.name, bool(body.stream)
    usage_in_stream = check_stream_options(body)
    try:
        options = request_options(served, body, facts, target, body.user or body.safety_identifier)
        changes = sampling_changes(body, _max_tokens(body))
        changes |= _formatted(body, changes)
        changes |= _logprobs(body)
        choices = choices_of(served, body, changes)
        messages = conversation.library_messages(body.messages, any_turns=any_turns)
        if served.settings.log_prompts:
            facts.prompt = messages
        continued = conversation.continues(body)
        tools, tool_options = chat_tools.tools_of(body)

        def render() -> tuple[Choices, PreparedReply]:
            rendered = served.llm.render(
                messages,
                tools=tools,
                tool_options=tool_options,
                add_generation_prompt=body.add_generation_prompt is not False,
                continue_final_message=continued,
                template_kwargs=body.chat_template_kwargs,
            )
            limited = _within_length(choices, body.max_length, len(rendered.ids))
            sampling = reply_sampling(limited.candidates()[0], rendered.reply)
            request = served.llm.request(rendered.ids, sampling, options)
            served.llm.check(request)
            return limited, PreparedReply(request, rendered)

        choices, reply = await served.in_thread(facts.client, render)
    except QwenkitError as error:
        raise described(error) from error
    requests = reply.requests(choices.n, choices.best_of)
    if body.logprobs:
        check_logprobs(served, requests, streamed=bool(body.stream))
    answers = Answers(served, facts, requests, [0] * len(requests))
    return Chat(
        served=served,
        facts=facts,
        body=body,
        target=target,
        choices=choices,
        answers=answers,
        readers=[reply.reader() for _ in requests],
        usage_in_stream=usage_in_stream,
        id=f"chatcmpl-{secrets.token_hex(12)}",
        created=int(time.time()),
    )


async def answer(chat: Chat, stream: AsyncEventStream) -> dict[str, Any]:
    """The whole answer, when all of it has come. What has come is written at once, so that nothing
    is left to do at the end that holds up the event loop.
    """
    count = len(chat.answers.requests)
    replies, tallies = [chat.reply() for _ in range(count)], [Tally() for _ in range(count)]
    entries: list[list[Json]] = [[] for _ in range(count)]
    writer = writer_of(chat.served, chat.choices.sampling) if chat.body.logprobs else None
    async for batch in chat.answers.batches(stream):
        for place, one in batch:
            tallies[place].push(one)
            replies[place].push(chat.readers[place].read(one).deltas)
            if writer is not None and isinstance(one, TokenEvent):
                entries[place] += map(Json, map(compact, writer.entries([one])))
    listed = []
    for index, place in enumerate(chat.choices.ranked([tally.mean_logprob for tally in tallies])):
        end, reply = tallies[place].finish, replies[place]
        choice: dict[str, Any] = {
            "index": index,
            "message": reply.message(),
            "logprobs": None if writer is None else {"content": entries[place], "refusal": None},
            "finish_reason": reply.finish_reason(end.reason),
        }
        listed.append(choice | stop_reason(chat.choices.sampling, end.reason, end.matched_stop))
        if chat.facts.prompt is not None:
            chat.facts.replies.append(reply.text)
    return {**chat.head("chat.completion"), "choices": listed, "usage": usage_of(chat.facts)}


async def stream_pieces(chat: Chat) -> AsyncGenerator[bytes]:
    """The answer as server-sent events: for each choice a first delta with the role, then what
    comes, then why it ended; the counts if they were asked for; [DONE].
    """
    written = StreamWriter(chat)
    try:
        async with chat.answers.running() as stream:
            for index in range(len(chat.answers.requests)):
                yield written.chunk(index, '{"role":"assistant","content":"","refusal":null}')
            async for batch in chat.answers.batches(stream):
                yield written.batch(batch)
    except QwenkitError as error:
        raise described(error) from error
    yield written.end()


class StreamWriter:
    """Writes the chunks of one stream. The text of tokens that are there together goes together."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._head = compact(chat.head("chat.completion.chunk"))[:-1]
        self._tail = ',"usage":null}' if chat.usage_in_stream else "}"
        self._sampling = chat.choices.sampling
        self._logprobs = writer_of(chat.served, self._sampling) if chat.body.logprobs else None
        self._replies = [chat.reply() for _ in chat.answers.requests]

    def chunk(self, index: int, delta: str, logprobs: str = "null", finish: str = "null") -> bytes:
        """One chunk of one choice; `finish` may have further fields behind its value."""
        return event(
            f'{self._head},"choices":[{{"index":{index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{finish}}}]{self._tail}'
        )

    def batch(self, batch: Sequence[tuple[int, Event]]) -> bytes:
        """The chunks of what has come. Raises ApiError for an answer that failed."""
        by_place: dict[int, list[Event]] = {}
        for place, one in batch:
            by_place.setdefault(place, []).append(one)
        return b"".join(self._of_choice(place, events) for place, events in by_place.items())

    def end(self) -> bytes:
        """What stands behind the last choice's end."""
        if not self._chat.usage_in_stream:
            return DONE
        usage = compact(usage_of(self._chat.facts))
        return event(f'{self._head},"choices":[],"usage":{usage}}}') + DONE

    def _of_choice(self, index: int, events: Sequence[Event]) -> bytes:
        reader, reply = self._chat.readers[index], self._replies[index]
        written = reply.push(delta for one in events for delta in reader.read(one).deltas)
        entries = []
        if self._logprobs is not None:
            entries = self._logprobs.entries(e for e in events if isinstance(e, TokenEvent))
        if entries and not written:
            written = ['{"content":""}']
        pieces = []
        for delta in written:
            shown = compact({"content": entries, "refusal": None}) if entries else "null"
            pieces.append(self.chunk(index, delta, shown))
            entries = []
        last = events[-1]
        if isinstance(last, FinishEvent):
            check_finish(last)
            more = stop_reason(self._sampling, last.reason, last.matched_stop)
            reason = json_text(reply.finish_reason(last.reason))
            shown = "".join(f',"{name}":{compact(value)}' for name, value in more.items())
            pieces.append(self.chunk(index, "{}", finish=reason + shown))
            if self._chat.facts.prompt is not None:
                self._chat.facts.replies.append(reply.text)
        return b"".join(pieces)


def _max_tokens(body: ChatRequest) -> int | None:
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        raise ApiError(
            400,
            f"max_tokens: got {old}, and {new} as max_completion_tokens; give one.",
            "max_tokens",
            "invalid_value",
        )
    return old if new is None else new


def _logprobs(body: ChatRequest) -> dict[str, Any]:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(
            400,
            'top_logprobs: add "logprobs": true.',
            "top_logprobs",
            "invalid_value",
        )
    return {"logprobs": body.top_logprobs or 0} if body.logprobs else {}


def _formatted(body: ChatRequest, changes: dict[str, Any]) -> dict[str, Any]:
    """What `response_format` makes the output be."""
    given = body.response_format
    if given is None or isinstance(given, TextFormat):
        return {}
    if "constraint" in changes:
        raise ApiError(
            400,
            "response_format: a guided_ field is given too; drop one.",
            "response_format",
            "invalid_value",
        )
    if isinstance(given, JsonObjectFormat):
        return {"constraint": {"json_schema": True}}
    schema = given.json_schema.schema_
    return {"constraint": {"json_schema": True if schema is None else schema}}


def _within_length(choices: Choices, length: int | None, prompt_tokens: int) -> Choices:
    """The same, no answer longer than `max_length` allows with the prompt."""
    if length is None:
        return choices
    room, asked = length - prompt_tokens, choices.sampling.max_tokens
    if room < 1:
        raise ApiError(
            400,
            f"max_length: {length} tokens are for prompt and answer together, and the prompt alone "
            f"has {prompt_tokens}.",
            "max_length",
            "context_length_exceeded",
        )
    tokens = room if asked is None else min(room, asked)
    return replace(choices, sampling=choices.sampling.replace(max_tokens=tokens))
