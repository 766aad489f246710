"""Bytes of a request's body to a JSON value, in bounded time, without what JSON does not allow."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from qwenkit.server.errors import ApiError

MOST_LEVELS = 128
_HALF_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_json(body: bytes) -> Any:
    """The value. Raises ApiError 400 saying what is wrong, and where.

    Refused beyond what `json.loads` refuses: NaN and infinities, also those that a number too large
    becomes; halves of surrogate pairs, which no UTF-8 can hold; nesting deeper than MOST_LEVELS.
    """
    if not body.strip():
        raise _refused("the body is empty; send a JSON object.")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise _refused(f"the body is not UTF-8 (byte {error.start + 1}).") from error
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError as error:
        raise _refused(f"the body is nested deeper than {MOST_LEVELS} levels.") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise _refused(f"the body is not JSON: {error.msg} ({place}).") from error
    except ValueError as error:
        raise _refused(f"the body is not JSON: {error}") from error
    if text.count("[") + text.count("{") > MOST_LEVELS:
        _check_levels(value)
    if "\\u" in text or "\\U" in text:
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


def _check_levels(value: Any) -> None:
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        if not level:
            return
        level = [
            inner
            for outer in level
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
