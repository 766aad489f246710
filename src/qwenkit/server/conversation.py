"""A request's messages, checked, as the library takes them.

Conversations that the first generation's server refused, and that make no sense to a chat model,
are refused in its words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qwenkit.server.errors import ApiError, in_old_words
from qwenkit.server.wire.chat import ChatMessage, ChatRequest, FunctionCall, RefusalPart

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def library_messages(
    messages: Sequence[ChatMessage], *, any_turns: bool = False
) -> list[dict[str, Any]]:
    """The messages in the words of `qwenkit.types.messages`. Raises ApiError, unless with
    `any_turns` also for turns that the first generation's server refused.
    """
    if not any_turns:
        check_turns(messages)
    read: list[dict[str, Any]] = []
    for place, message in enumerate(messages):
        read.append(_message(message, place, read))
    return read


def check_turns(messages: Sequence[ChatMessage]) -> None:
    """Raises ApiError 400 where a turn cannot stand, in the words of the first generation."""
    if not any(message.role == "user" for message in messages):
        raise in_old_words("Expecting at least one user message.", "messages")
    spoken = [m.role for m in messages if m.role not in ("system", "developer")]
    places = [i for i, m in enumerate(messages) if m.role not in ("system", "developer")]
    for index, (role, place) in enumerate(zip(spoken, places, strict=True)):
        before = spoken[index - 1] if index else None
        if role in ("function", "tool") and before not in ("assistant", "function", "tool"):
            raise in_old_words(
                f"Expecting role assistant before role {role}.", f"messages[{place}]"
            )
        if role == "assistant" and before is None:
            raise in_old_words("Expecting role user before role assistant.", f"messages[{place}]")


def incorrect_role(role: object, param: str) -> ApiError:
    """What is said of a role that there is none of."""
    error = in_old_words(f"Incorrect role {role}.", param)
    error.message += f" Allowed: {', '.join(ROLES)}."
    return error


def continues(body: ChatRequest) -> bool:
    """Whether the answer goes on within the last message. Raises ApiError.

    An assistant's text at the end is continued unless the request says otherwise, as the first
    generation's server did.
    """
    last = body.messages[-1]
    if body.continue_final_message and body.add_generation_prompt:
        raise ApiError(
            400,
            "continue_final_message: a continued message and a new one exclude each other; drop "
            "add_generation_prompt.",
            "continue_final_message",
            "invalid_value",
        )
    if body.continue_final_message is not None:
        return body.continue_final_message
    is_text = last.role == "assistant" and not last.tool_calls and last.function_call is None
    return is_text and not body.add_generation_prompt


def _message(message: ChatMessage, place: int, before: Sequence[dict[str, Any]]) -> dict[str, Any]:
    role: str = message.role
    content = _text(message)
    value: dict[str, Any] = {"role": role, "content": content}
    if role == "developer":
        value["role"] = "system"
    elif role == "function":
        value |= {"role": "tool", "tool_call_id": _last_call_id(before)}
    elif role == "tool":
        value["tool_call_id"] = message.id
    for key in ("name", "tool_call_id", "reasoning_content"):
        given = getattr(message, key)
        if given is not None:
            value[key] = given
    calls = [_call(call.function, call.id) for call in message.tool_calls or ()]
    if message.function_call is not None:
        calls.append(_call(message.function_call, f"call_{place}"))
    if calls:
        value["tool_calls"] = calls
    if content is None:
        if not calls:
            raise ApiError(
                400,
                f"messages[{place}].content: expected text.",
                f"messages[{place}].content",
                "invalid_value",
            )
        value["content"] = ""
    if calls and role != "assistant":
        raise ApiError(
            400,
            f"messages[{place}].tool_calls: only the assistant calls tools, not the {role}.",
            f"messages[{place}].tool_calls",
            "invalid_value",
        )
    return {key: given for key, given in value.items() if given is not None}


def _text(message: ChatMessage) -> str | None:
    content = message.content
    if content is None:
        return message.refusal
    if isinstance(content, str):
        return content
    return "".join(p.refusal if isinstance(p, RefusalPart) else p.text for p in content)


def _call(function: FunctionCall, identifier: str | None) -> dict[str, Any]:
    given = function.arguments
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    called = {"name": function.name, "arguments": text}
    return {"type": "function", "function": called} | ({"id": identifier} if identifier else {})


def _last_call_id(before: Sequence[dict[str, Any]]) -> str | None:
    """The call that a message of the role "function" answers: the last one, for it names none."""
    for message in reversed(before):
        for call in reversed(message.get("tool_calls", ())):
            identifier: str | None = call.get("id")
            return identifier
    return None
