"""Bytes of a request's body to a JSON value, in bounded time, without what JSON does not allow.

Values of Python take about a microsecond each to make, and Python makes all of a text's values in
one go, in which nothing else runs. So a body that may have very many is read piece by piece in a
thread, beside the event loop.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, NoReturn

from qwenkit.server.errors import ApiError

MOST_LEVELS = 128
MOST_OBJECTS = 10_000
_AT_ONCE = 20_000  # values that may be made in one go
_STEPPED_LEVELS = 4
_HALF_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACES = re.compile(r"[ \t\n\r]*")


async def read_json(body: bytes) -> Any:
    """The value, as `parse_json` gives it, without holding up the event loop."""
    if body.count(b",") <= _AT_ONCE:
        return parse_json(body)
    return await asyncio.to_thread(parse_json, body, stepwise=True)


def parse_json(body: bytes, *, stepwise: bool = False) -> Any:
    """The value. Raises ApiError 400 saying what is wrong, and where.

    Refused beyond what `json.loads` refuses: NaN and infinities, also those that a number too large
    becomes; halves of surrogate pairs, which no UTF-8 can hold; nesting deeper than MOST_LEVELS;
    more than MOST_OBJECTS objects. With `stepwise` other threads get their turns meanwhile.
    """
    if not body.strip():
        raise _refused("the body is empty; send a JSON object.")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise _refused(f"the body is not UTF-8 (byte {error.start + 1}).") from error
    try:
        value = _stepped(text) if stepwise else _DECODER.decode(text)
    except RecursionError as error:
        raise _refused(f"the body is nested deeper than {MOST_LEVELS} levels.") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise _refused(f"the body is not JSON: {error.msg} ({place}).") from error
    except ValueError as error:
        raise _refused(f"the body is not JSON: {error}") from error
    if text.count("[") + text.count("{") > MOST_LEVELS:
        _check_size(value)
    if "\\u" in text:
        _check_texts(value)
    return value


def _refused(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number.")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text:.40} is too large.")
    return number


_DECODER = json.JSONDecoder(parse_constant=_no_number, parse_float=_finite)


def _stepped(text: str) -> Any:
    value, end = _value(text, _space(text, 0), _STEPPED_LEVELS)
    end = _space(text, end)
    if end < len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def _value(text: str, at: int, levels: int) -> tuple[Any, int]:
    """The value that begins at a place, and where it ends; of so many levels member by member."""
    first = text[at : at + 1]
    if levels and first in ("{", "["):
        return _members(text, at, levels - 1, is_object=first == "{")
    return _DECODER.raw_decode(text, at)


def _members(text: str, at: int, levels: int, *, is_object: bool) -> tuple[Any, int]:
    closing = "}" if is_object else "]"
    pairs: dict[str, Any] = {}
    items: list[Any] = []
    at = _space(text, at + 1)
    if text[at : at + 1] == closing:
        return (pairs if is_object else items), at + 1
    while True:
        key = ""
        if is_object:
            if text[at : at + 1] != '"':
                raise json.JSONDecodeError("Expecting property name", text, at)
            key, at = scanstring(text, at + 1)
            at = _space(text, at)
            if text[at : at + 1] != ":":
                raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
            at = _space(text, at + 1)
        value, at = _value(text, at, levels)
        if is_object:
            pairs[key] = value
        else:
            items.append(value)
        at = _space(text, at)
        if text[at : at + 1] == closing:
            return (pairs if is_object else items), at + 1
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = _space(text, at + 1)


def _space(text: str, at: int) -> int:
    match = _SPACES.match(text, at)
    assert match is not None, "none is also a match"
    return match.end()


def _check_size(value: Any) -> None:
    """Level by level. Raises ApiError for too many of them, or too many objects."""
    level, objects = [value], 0
    for _ in range(MOST_LEVELS + 1):
        if not level:
            return
        objects += sum(isinstance(outer, dict) for outer in level)
        if objects > MOST_OBJECTS:
            raise _refused(f"the body has more than {MOST_OBJECTS:,} objects in it.")
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    raise _refused(f"the body is nested deeper than {MOST_LEVELS} levels.")


def _check_texts(value: Any) -> None:
    """Half a surrogate can only come from an escape."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            found = _HALF_SURROGATE.search(one)
            if found:
                code = ord(found.group())
                raise _refused(f"a text has half a surrogate pair (\\u{code:04x}) in it.")
        elif isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            waiting += one
