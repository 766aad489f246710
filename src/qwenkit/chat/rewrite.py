"""Tools, calls and results as plain messages, for ChatML models whose template knows none."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

from qwenkit.types.messages import Message, Tool, ToolCall


def in_call_order(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with the results of several calls in the order of the calls.

    Dialects tell results apart by their order only, and who runs calls at the same time may hand
    over first what was done first. Results stay as they are unless each names a call by its id.
    """
    ordered: list[Message] = []
    places: dict[str | None, int] = {}
    results: list[Message] = []
    for message in (*messages, None):
        if message is not None and message.role == "tool":
            results.append(message)
            continue
        if len({r.tool_call_id for r in results} & set(places)) == len(results):
            results.sort(key=lambda result: places[result.tool_call_id])
        ordered += results
        results = []
        if message is not None:
            ordered.append(message)
            places = {call.id: i for i, call in enumerate(message.tool_calls) if call.id}
    return tuple(ordered)


def rewritten(
    messages: Sequence[Message],
    tools: Sequence[Tool],
    instruction: str,
    call: Callable[[ToolCall], str],
) -> tuple[Message, ...]:
    """As the templates of Qwen2.5 and later do it: the instruction behind the system message, calls
    behind the assistant's text, results in a user's message.

    `instruction` has the place {tools} for the definitions, one a line.
    """
    written: list[Message] = []
    after_result = False
    for message in messages:
        if message.tool_calls:
            parts = [message.content] if message.content else []
            content = "\n".join([*parts, *map(call, message.tool_calls)])
            written.append(replace(message, content=content, tool_calls=()))
        elif message.role == "tool" and after_result:
            joined = f"{written[-1].content}\n{_result(message)}"
            written[-1] = replace(written[-1], content=joined)
        elif message.role == "tool":
            written.append(Message("user", _result(message)))
        else:
            written.append(message)
        after_result = message.role == "tool"
    if not tools:
        return tuple(written)
    text = instruction.replace("{tools}", "\n".join(map(_definition, tools)))
    return with_instruction(written, text)


def with_instruction(messages: Sequence[Message], instruction: str) -> tuple[Message, ...]:
    """The messages with an instruction behind the system message, or as one."""
    if messages and messages[0].role == "system":
        content = f"{messages[0].content}\n\n{instruction}"
        return (replace(messages[0], content=content), *messages[1:])
    return (Message("system", instruction), *messages)


def _definition(tool: Tool) -> str:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
    }
    return json.dumps({"type": "function", "function": function}, ensure_ascii=False)


def _result(message: Message) -> str:
    return f"<tool_response>\n{message.content}\n</tool_response>"
