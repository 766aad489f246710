"""Ollama's /api/chat and /api/generate, for the tools that speak only that."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.responses import Response

from qwenkit.errors import QwenkitError
from qwenkit.server import chat, completions
from qwenkit.server.answers import Answers, check_finish
from qwenkit.server.errors import ApiError, described
from qwenkit.server.facts import Facts, facts_of
from qwenkit.server.ollama_models import now, served_name
from qwenkit.server.route import group
from qwenkit.server.served import Served
from qwenkit.server.sse import JsonLinesStream, compact, json_answer
from qwenkit.server.wire.base import read
from qwenkit.server.wire.chat import ChatRequest
from qwenkit.server.wire.completions import CompletionRequest
from qwenkit.server.wire.ollama import (
    ChatLine,
    GenerateLine,
    OllamaChat,
    OllamaFields,
    OllamaGenerate,
    OllamaMessage,
)
from qwenkit.types.deltas import CallEnd, CallStart, ContentDelta, ReasoningDelta, ReplyDelta
from qwenkit.types.events import Event, FinishEvent, PromptEvent

router = group()
_SAME = ("temperature", "top_k", "top_p", "min_p", "seed", "presence_penalty", "frequency_penalty")
Read = Callable[[Event], Iterable[ReplyDelta]]


@dataclass(slots=True)
class Said:
    """What has come of a reply: all of it, or since the last line."""

    content: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.thinking or self.calls)

    def message(self) -> dict[str, Any]:
        """As /api/chat has it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.thinking:
            message["thinking"] = self.thinking
        if self.calls:
            message["tool_calls"] = self.calls
        return {"message": message}

    def response(self) -> dict[str, Any]:
        """As /api/generate has it."""
        thinking = {"thinking": self.thinking} if self.thinking else {}
        return {"response": self.content, **thinking}


@dataclass(slots=True)
class Turn:
    """One answer that is ready to run, in the shape of its endpoint."""

    served: Served
    facts: Facts
    name: str
    answers: Answers
    deltas: Read
    is_chat: bool
    names: dict[int, str] = field(default_factory=dict)

    def line(self, said: Said, end: FinishEvent | None = None) -> dict[str, Any]:
        """A line, the last one with `end`."""
        shown = said.message() if self.is_chat else said.response()
        line = {"model": self.name, "created_at": now(), **shown, "done": end is not None}
        return line if end is None else line | self._end(end)

    def take(self, event: Event, said: Said) -> None:
        """Add what an event says."""
        for delta in self.deltas(event):
            if isinstance(delta, ContentDelta):
                said.content += delta.text
            elif isinstance(delta, ReasoningDelta):
                said.thinking += delta.text
            elif isinstance(delta, CallStart):
                self.names[delta.index] = delta.name
            elif isinstance(delta, CallEnd):
                arguments = _arguments(delta.arguments)
                name = self.names.pop(delta.index)
                said.calls.append({"function": {"name": name, "arguments": arguments}})

    def _end(self, end: FinishEvent) -> dict[str, Any]:
        facts, now_s = self.facts, time.perf_counter()
        first_s = facts.first_token_s or now_s
        return {
            "done_reason": end.reason,
            "total_duration": _nanoseconds(now_s - facts.start_s),
            "load_duration": 0,
            "prompt_eval_count": facts.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first_s - facts.start_s),
            "eval_count": facts.completion_tokens,
            "eval_duration": _nanoseconds(now_s - first_s),
        }


@router.post("/api/chat", response_model=ChatLine, summary="Ollama's: the next turn.")
async def ollama_chat(body: OllamaChat, request: Request) -> Response:
    """Lines of JSON, or with `stream` false one object."""
    served, facts = request.app.state.served, facts_of(request.scope)
    _check(body, served)
    if not body.messages:
        name = served_name(served, body.model)
        return json_answer(_loaded(name, {"message": {"role": "assistant", "content": ""}}))
    fields = _fields(body, served)
    fields |= {
        "messages": [_message(message) for message in body.messages],
        "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()] or None,
        "continue_final_message": None,
    }
    return await _answer(body, await _chat_turn(fields, served, facts, is_chat=True))


@router.post("/api/generate", response_model=GenerateLine, summary="Ollama's: one answer.")
async def ollama_generate(body: OllamaGenerate, request: Request) -> Response:
    """Lines of JSON, or with `stream` false one object."""
    served, facts = request.app.state.served, facts_of(request.scope)
    _check(body, served)
    if not body.prompt:
        return json_answer(_loaded(served_name(served, body.model), {"response": ""}))
    fields = _fields(body, served)
    if body.raw:
        if body.system is not None:
            message = "system: a raw prompt has its own; drop one."
            raise ApiError(400, message, "system", "invalid_value")
        return await _answer(body, await _raw_turn(body.prompt, fields, served, facts))
    system = [] if body.system is None else [{"role": "system", "content": body.system}]
    fields["messages"] = [*system, {"role": "user", "content": body.prompt}]
    return await _answer(body, await _chat_turn(fields, served, facts, is_chat=False))


async def _chat_turn(
    fields: dict[str, Any], served: Served, facts: Facts, *, is_chat: bool
) -> Turn:
    body = read(ChatRequest, fields)
    prepared = await chat.prepared(body, served, facts, any_turns=True)
    reader = prepared.readers[0]
    return Turn(
        served=served,
        facts=facts,
        name=prepared.target.name,
        answers=prepared.answers,
        deltas=lambda event: reader.read(event).deltas,
        is_chat=is_chat,
    )


async def _raw_turn(prompt: str, fields: dict[str, Any], served: Served, facts: Facts) -> Turn:
    fields.pop("chat_template_kwargs", None)
    fields["max_tokens"] = fields.get("max_tokens") or served.llm.context_tokens
    body = read(CompletionRequest, fields | {"prompt": prompt})
    prepared = await completions.prepared(body, served, facts)
    return Turn(
        served=served,
        facts=facts,
        name=prepared.target.name,
        answers=prepared.answers,
        deltas=lambda one: () if isinstance(one, PromptEvent) else (ContentDelta(one.text),),
        is_chat=False,
    )


async def _answer(body: OllamaFields, turn: Turn) -> Response:
    turn.facts.stream = body.stream is not False
    if body.stream is not False:
        return JsonLinesStream(_lines(turn), keep_alive_s=turn.served.settings.keep_alive_s)
    said, end = Said(), None
    try:
        async with turn.answers.running() as stream:
            async for batch in turn.answers.batches(stream):
                for _, one in batch:
                    end = _ended(one) or end
                    turn.take(one, said)
    except QwenkitError as error:
        raise described(error) from error
    return json_answer(turn.line(said, end))


async def _lines(turn: Turn) -> AsyncGenerator[bytes]:
    """A line for all that is there together, and one for the end."""
    try:
        async with turn.answers.running() as stream:
            yield b""  # all is well so far: the head may be sent
            async for batch in turn.answers.batches(stream):
                said, end = Said(), None
                for _, one in batch:
                    end = _ended(one) or end
                    turn.take(one, said)
                lines = [turn.line(said)] if said else []
                lines += [] if end is None else [turn.line(Said(), end)]
                yield b"".join(compact(line).encode("utf-8", "replace") + b"\n" for line in lines)
    except QwenkitError as error:
        raise described(error) from error


def _ended(event: Event) -> FinishEvent | None:
    if not isinstance(event, FinishEvent):
        return None
    check_finish(event)
    return event


def _check(body: OllamaFields, served: Served) -> None:
    served_name(served, body.model)
    if body.keep_alive in (0, "0", "0s", "0m", "0h"):
        message = "keep_alive: the model stays loaded as long as the server runs; leave it out."
        raise ApiError(400, message, "keep_alive", "unsupported_value")
    options, most = body.options, served.llm.context_tokens
    if options is not None and options.num_ctx is not None and options.num_ctx > most:
        message = (
            f"options.num_ctx: this server's context is {most} tokens. Leave it out, or start the "
            f"server with --context {options.num_ctx}."
        )
        raise ApiError(400, message, "options.num_ctx", "invalid_value")
    knows = "enable_thinking" in (served.llm.record.chat_template or "")
    if body.think and not knows:
        message = "think: this model has no way to be told so; leave it out."
        raise ApiError(400, message, "think", "unsupported_value")


def _fields(body: OllamaFields, served: Served) -> dict[str, Any]:
    """The fields of OpenAI's request that say the same."""
    options = body.options
    fields: dict[str, Any] = {"model": served_name(served, body.model)}
    if options is not None:
        fields |= {name: getattr(options, name) for name in _SAME}
        fields["repetition_penalty"] = options.repeat_penalty
        fields["stop"] = options.stop
        if options.num_predict is not None and options.num_predict >= 0:
            fields["max_tokens"] = max(1, options.num_predict)
    if body.format == "json":
        fields["guided_json"] = True
    elif isinstance(body.format, dict):
        fields["guided_json"] = body.format
    if body.think is not None and "enable_thinking" in (served.llm.record.chat_template or ""):
        fields["chat_template_kwargs"] = {"enable_thinking": body.think}
    return {name: value for name, value in fields.items() if value is not None}


def _message(message: OllamaMessage) -> dict[str, Any]:
    """A message in OpenAI's words."""
    value = message.model_dump(exclude_none=True, exclude={"thinking", "tool_name", "tool_calls"})
    if message.thinking is not None:
        value["reasoning_content"] = message.thinking
    if message.tool_name is not None:
        value["name"] = message.tool_name
    calls = [
        {"function": {"name": call.function.name, "arguments": call.function.arguments}}
        for call in message.tool_calls or ()
    ]
    if calls:
        value["tool_calls"] = calls
    else:
        value.setdefault("content", "")
    return value


def _loaded(name: str, shown: dict[str, Any]) -> dict[str, Any]:
    return {"model": name, "created_at": now(), **shown, "done": True, "done_reason": "load"}


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments as an object; what is none stands in one by itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {"text": text}
    return value if isinstance(value, dict) else {"value": value}


def _nanoseconds(span_s: float) -> int:
    return round(span_s * 1e9)
