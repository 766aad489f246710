"""One answer of /v1/chat/completions as it comes: deltas for a stream, a message for the whole."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwenkit.server.sse import json_text
from qwenkit.types.deltas import (
    CallArguments,
    CallEnd,
    CallStart,
    ContentDelta,
    ReasoningDelta,
    ReplyDelta,
)


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


class ChatReply:
    """Takes a reply's deltas. With `legacy` a call is a `function_call`, of which there is one."""

    def __init__(self, *, legacy: bool = False) -> None:
        self._legacy = legacy
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, _Call] = {}

    @property
    def text(self) -> str:
        """What was said."""
        return "".join(self._content)

    def push(self, deltas: Iterable[ReplyDelta]) -> list[str]:
        """Take deltas; return them as the JSON of OpenAI's, with those of one kind that follow each
        other made one.
        """
        written: list[str] = []
        for kind in _joined(deltas):
            if isinstance(kind, ContentDelta):
                self._content.append(kind.text)
                written.append(f'{{"content":{json_text(kind.text)}}}')
            elif isinstance(kind, ReasoningDelta):
                self._reasoning.append(kind.text)
                written.append(f'{{"reasoning_content":{json_text(kind.text)}}}')
            elif isinstance(kind, CallStart):
                call = _Call(f"call_{secrets.token_hex(12)}", kind.name)
                self._calls[kind.index] = call
                written.append(self._start(kind.index, call))
            elif isinstance(kind, CallArguments):
                self._calls[kind.index].arguments.append(kind.text)
                written.append(self._arguments(kind))
        return written

    def finish_reason(self, reason: str) -> str:
        """Why it ended, in OpenAI's words where it has them."""
        if reason != "stop" or not self._calls:
            return reason
        return "function_call" if self._legacy else "tool_calls"

    def message(self) -> dict[str, Any]:
        """The whole message."""
        text, calls = "".join(self._content), list(self._calls.values())
        content = None if calls and not text else text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        functions = [{"name": c.name, "arguments": "".join(c.arguments)} for c in calls]
        if self._legacy and calls:
            message["function_call"] = functions[0]
        elif calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": function}
                for call, function in zip(calls, functions, strict=True)
            ]
        return message

    def _start(self, index: int, call: _Call) -> str:
        function = f'{{"name":{json_text(call.name)},"arguments":""}}'
        if self._legacy:
            return f'{{"function_call":{function}}}'
        return (
            f'{{"tool_calls":[{{"index":{index},"id":"{call.id}","type":"function",'
            f'"function":{function}}}]}}'
        )

    def _arguments(self, more: CallArguments) -> str:
        function = f'{{"arguments":{json_text(more.text)}}}'
        if self._legacy:
            return f'{{"function_call":{function}}}'
        return f'{{"tool_calls":[{{"index":{more.index},"function":{function}}}]}}'


def _joined(deltas: Iterable[ReplyDelta]) -> Sequence[ReplyDelta]:
    """The same with neighbours of one kind made one, and without those that say nothing."""
    joined: list[ReplyDelta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if isinstance(delta, CallEnd):
            continue
        if isinstance(delta, ContentDelta | ReasoningDelta | CallArguments) and not delta.text:
            continue
        if isinstance(delta, ContentDelta) and isinstance(last, ContentDelta):
            joined[-1] = ContentDelta(last.text + delta.text)
        elif isinstance(delta, ReasoningDelta) and isinstance(last, ReasoningDelta):
            joined[-1] = ReasoningDelta(last.text + delta.text)
        elif (
            isinstance(delta, CallArguments)
            and isinstance(last, CallArguments)
            and last.index == delta.index
        ):
            joined[-1] = CallArguments(delta.index, last.text + delta.text)
        else:
            joined.append(delta)
    return joined
