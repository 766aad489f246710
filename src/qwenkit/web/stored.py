"""Conversations as JSON: what the browser keeps and what an export holds.

Everything that comes back from a browser or a file is checked; a wrong one is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from qwenkit.errors import UsageError
from qwenkit.types.messages import ToolCall
from qwenkit.web.conversation import Conversation, Stats, Turn

FORMAT = "qwenkit-conversation"
VERSION = 1
_ROLES = ("user", "assistant", "tool")
_NOTHING: tuple[object, ...] = ("", None, (), [])


def whole(text: str) -> str:
    """`text` as Unicode: half of a surrogate pair, which no JSON or HTTP carries, becomes U+FFFD.

    Halves that belong together are joined.
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def to_json(conversation: Conversation, *, indent: int | None = None) -> str:
    """The conversation as JSON; what is empty is left out."""
    return json.dumps(to_plain(conversation), ensure_ascii=False, indent=indent)


def to_plain(conversation: Conversation) -> dict[str, Any]:
    """The conversation as dictionaries and lists."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "id": conversation.id,
        "title": conversation.title,
        "system": conversation.system,
        "revision": conversation.revision,
        "turns": [_plain(asdict(turn)) for turn in conversation.turns],
    }


def _plain(item: Mapping[str, Any]) -> dict[str, Any]:
    filled = {name: value for name, value in item.items() if value not in _NOTHING}
    if "calls" in filled:
        filled["calls"] = [_plain(call) for call in filled["calls"]]
    if "stats" in filled:
        filled["stats"] = _plain(filled["stats"])
    return filled


def from_json(text: str) -> Conversation:
    """Raises UsageError saying what is wrong with it."""
    try:
        item = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"A conversation must be JSON: {error}.") from error
    return from_plain(item)


def from_plain(item: Any) -> Conversation:
    """Raises UsageError naming the field that cannot be used."""
    if not isinstance(item, Mapping) or item.get("format") != FORMAT:
        raise UsageError(f'This is no conversation: "format" must be "{FORMAT}".')
    if item.get("version") != VERSION:
        raise UsageError(f'"version" is {item.get("version")!r}; this page reads {VERSION}.')
    turns = item.get("turns", [])
    if not isinstance(turns, list):
        raise UsageError('"turns" must be a list.')
    identifier = _text(item, "id", "")
    if not identifier.isalnum() or len(identifier) > 64:
        raise UsageError('"id" must be up to 64 letters and digits.')
    return Conversation(
        id=identifier,
        title=_text(item, "title", ""),
        system=_text(item, "system", ""),
        revision=int(_number(item, "revision", "") or 0),
        turns=tuple(_turn(turn, f"turns[{i}]") for i, turn in enumerate(turns)),
    )


def _turn(item: Any, where: str) -> Turn:
    if not isinstance(item, Mapping) or item.get("role") not in _ROLES:
        raise UsageError(f'"{where}.role" must be one of {", ".join(_ROLES)}.')
    calls = item.get("calls", [])
    if not isinstance(calls, list):
        raise UsageError(f'"{where}.calls" must be a list.')
    stats = item.get("stats")
    call_id = _text(item, "call_id", where)
    return Turn(
        role=item["role"],
        text=_text(item, "text", where),
        reasoning=_text(item, "reasoning", where),
        calls=tuple(_call(call, f"{where}.calls[{i}]") for i, call in enumerate(calls)),
        call_id=call_id or None,
        model=_text(item, "model", where),
        ended=_text(item, "ended", where),
        error=_text(item, "error", where),
        stats=None if stats is None else _stats(stats, f"{where}.stats"),
    )


def _call(item: Any, where: str) -> ToolCall:
    if not isinstance(item, Mapping):
        raise UsageError(f'"{where}" must be an object.')
    return ToolCall(
        name=_text(item, "name", where),
        arguments=_text(item, "arguments", where),
        id=_text(item, "id", where) or None,
    )


def _stats(item: Any, where: str) -> Stats:
    if not isinstance(item, Mapping):
        raise UsageError(f'"{where}" must be an object.')
    counts = {
        field.name: _number(item, field.name, where)
        for field in fields(Stats)
        if field.name in item
    }
    return Stats(**counts)  # type: ignore[arg-type]  # numbers all, checked above


def _text(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name, "")
    if not isinstance(value, str):
        raise UsageError(f'"{f"{where}.{name}".lstrip(".")}" must be text.')
    return whole(value)


def _number(item: Mapping[str, Any], name: str, where: str) -> float | None:
    value = item.get(name)
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    raise UsageError(f'"{f"{where}.{name}".lstrip(".")}" must be a number.')
