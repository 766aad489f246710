"""From a conversation and the settings to the request that is sent.

A setting left empty is not sent: the server's own default holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenkit.errors import UsageError
from qwenkit.types.messages import ToolCall, parse_tools
from qwenkit.web.conversation import Conversation, Turn, is_void
from qwenkit.web.stored import whole


@dataclass(frozen=True, slots=True)
class Setting:
    """One number that a request can carry: `lowest` and `highest` are inclusive, None is open.

    `standard` fields are OpenAI's; the others are understood by qwenkit and its peers.
    """

    name: str
    lowest: float | None
    highest: float | None
    is_whole: bool = False
    standard: bool = True


SETTINGS = (
    Setting("temperature", 0, 2),
    Setting("top_p", 0, 1),
    Setting("max_tokens", 1, None, is_whole=True),
    Setting("seed", 0, 2**63 - 1, is_whole=True),
    Setting("presence_penalty", -2, 2),
    Setting("frequency_penalty", -2, 2),
    Setting("top_k", 0, None, is_whole=True, standard=False),
    Setting("min_p", 0, 1, standard=False),
    Setting("repetition_penalty", 0.01, None, standard=False),
)
TEXTS = ("stop", "tools")


def build(conversation: Conversation, *, model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the client's `chat.completions.create`, streaming, with usage.

    `settings` maps names of `SETTINGS` to numbers, "stop" to one stop text a line and "tools" to a
    JSON list of tools; what is None or empty is not sent. Raises UsageError naming the setting.
    """
    request: dict[str, Any] = {
        "model": model,
        "messages": messages(conversation),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    extra: dict[str, Any] = {}
    for setting in SETTINGS:
        value = settings.get(setting.name)
        if value is not None and value != "":
            (request if setting.standard else extra)[setting.name] = _checked(setting, value)
    if stops := [line for line in str(settings.get("stop") or "").splitlines() if line]:
        request["stop"] = [_unescaped(stop) for stop in stops]
    if tools := _tools(str(settings.get("tools") or "")):
        request["tools"] = tools
    if extra:
        request["extra_body"] = extra
    return request


def messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The history as messages, every text exactly as it was typed or received.

    Thoughts are not sent back, as chat templates ask; a reply that said nothing is left out.
    """
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    said = [
        _message(turn)
        for turn in conversation.turns
        if not (turn.role == "assistant" and is_void(turn))
    ]
    return [*system, *said]


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.text}
    if turn.calls:
        message["tool_calls"] = [_call(call) for call in turn.calls]
    if turn.role == "tool":
        message["tool_call_id"] = turn.call_id or ""
    return message


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id or "", "type": "function", "function": function}


def _checked(setting: Setting, value: Any) -> float | int:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{setting.name}: {value!r} is no number.") from error
    low = setting.lowest is not None and number < setting.lowest
    high = setting.highest is not None and number > setting.highest
    if number != number or low or high or (setting.is_whole and number != int(number)):
        raise UsageError(f"{setting.name}: got {value}; allowed: {_range(setting)}.")
    return int(value) if setting.is_whole else number


def _range(setting: Setting) -> str:
    kind = "whole numbers" if setting.is_whole else "numbers"
    if setting.highest is None:
        return f"{kind} from {setting.lowest}"
    return f"{kind} from {setting.lowest} to {setting.highest}"


def _unescaped(line: str) -> str:
    r"""A stop text is typed on one line: \n, \t and \\ stand for what cannot be typed there."""
    pairs: dict[str, str] = {"n": "\n", "t": "\t", "\\": "\\"}
    result, rest = "", line
    while "\\" in rest:
        before, _, rest = rest.partition("\\")
        escaped = pairs.get(rest[:1])
        result += before + ("\\" if escaped is None else escaped)
        rest = rest if escaped is None else rest[1:]
    return result + rest


def _tools(text: str) -> list[dict[str, Any]]:
    if not text.strip():
        return []
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"tools: not JSON: {error}.") from error
    if not isinstance(items, list):
        raise UsageError("tools: expected a JSON list of tools, [{…}].")
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": dict(tool.parameters),
            },
        }
        for tool in parse_tools(items)
    ]


def read_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's fields hold, of names that a request knows; texts made whole."""
    names = {setting.name for setting in SETTINGS} | {*TEXTS}
    return {
        name: whole(value) if isinstance(value, str) else value
        for name, value in values.items()
        if name in names
    }
