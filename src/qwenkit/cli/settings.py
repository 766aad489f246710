"""Sampling options written as text, for the chat's `:conf`: read by each option's own type."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, get_type_hints

from qwenkit.errors import RequestError, suggest
from qwenkit.types.constraint import Constraint
from qwenkit.types.sampling import LoopDetection, SamplingParams


def parse_setting(name: str, text: str) -> Any:
    """The value of the sampling option `name` written as `text`, read by the option's own type.

    "none" empties an option that can be empty; lists are JSON. Nothing is ever evaluated. Raises
    RequestError: an unknown name (with the nearest), or a text that is not of that type.
    """
    kinds = get_type_hints(SamplingParams)
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    if name not in names:
        raise RequestError(name, f"unknown sampling option. {suggest(name, names)}")
    kind = kinds[name]
    if kind in (int | None, LoopDetection | None, Constraint | None) and text.lower() == "none":
        return None
    try:
        return _READERS[kind](text)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(name, f"expected {_EXPECTED[kind]}, got {text!r}.") from error


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _read_strings(text: str) -> tuple[str, ...]:
    items = _read_list(text) if text.startswith("[") else [text]
    if not all(isinstance(item, str) for item in items):
        raise ValueError(text)
    return tuple(items)


def _read_ids(text: str) -> tuple[int, ...]:
    return _ids(_read_list(text if text.startswith("[") else f"[{text}]"))


def _read_sequences(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(_ids(item) for item in _read_list(text))


def _read_list(text: str) -> list[Any]:
    try:
        items = json.loads(text)
    except RecursionError as error:
        raise ValueError(text) from error
    if not isinstance(items, list):
        raise ValueError(text)
    return items


def _read_biases(text: str) -> dict[str, Any] | list[Any]:
    return _read_object(text) if text.startswith("{") else _read_list(text)


def _read_loop_detection(text: str) -> bool | dict[str, Any]:
    return _read_object(text) if text.startswith("{") else _read_bool(text)


def _read_object(text: str) -> dict[str, Any]:
    try:
        items: dict[str, Any] = json.loads(text)
    except RecursionError as error:
        raise ValueError(text) from error
    return items


def _ids(items: Any) -> tuple[int, ...]:
    if not isinstance(items, list) or not all(type(item) is int for item in items):
        raise ValueError(items)
    return tuple(items)


_READERS: dict[Any, Any] = {
    int: int,
    int | None: int,
    float: float,
    bool: _read_bool,
    tuple[str, ...]: _read_strings,
    tuple[int, ...]: _read_ids,
    tuple[tuple[int, ...], ...]: _read_sequences,
    tuple[tuple[int, float], ...]: _read_biases,
    LoopDetection | None: _read_loop_detection,
    Constraint | None: Constraint.from_json,
}
_EXPECTED: dict[Any, str] = {
    int: "a whole number",
    int | None: "a whole number or none",
    float: "a number",
    bool: "true or false",
    tuple[str, ...]: 'one text or a JSON list of texts, like ["\\n", "User:"]',
    tuple[int, ...]: "token ids, like 13,198",
    tuple[tuple[int, ...], ...]: "a JSON list of id lists, like [[13, 198]]",
    tuple[tuple[int, float], ...]: 'a JSON object of ids and numbers, like {"13": -100}',
    LoopDetection | None: 'true, none, or a JSON object like {"repeats": 4, "tokens": 128}',
    Constraint | None: 'a constraint as JSON, like {"choice": ["yes", "no"]}, or none',
}
