"""What an output must be: JSON of a schema, a match of a regex, one of some texts, a sentence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qwenkit.errors import RequestError, suggest

MOST_BYTES = 1 << 16  # of a constraint's text: what compiles in moments and small memory
MOST_CHOICES = 10_000
# Between the signs of JSON a space, or a line break and an indent: a model must not run on there.
SPACES = r"( |\n( {0,32}|\t{0,8}))"
ANY_OBJECT = '{"type": "object"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """Exactly one of four rules that a whole output keeps.

    `json_schema` is a JSON schema as a mapping or as its text (True: any JSON object), kept as
    text; `regex` is matched by the whole output, in the syntax of Rust's regex crate; `choice` is a
    list of texts, one of which the output is; `grammar` is a Lark grammar whose rule is `start`.
    `source` is the field that errors name, where something else has been made into this.

    Raises RequestError naming the field on construction.
    """

    json_schema: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    source: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        given = [name for name in _NAMES if getattr(self, name) is not None]
        if len(given) != 1:
            some = " and ".join(given) or "none"
            raise RequestError("constraint", f"got {some}; give one of {', '.join(_NAMES)}.")
        name = given[0]
        value = _READERS[name](f"constraint.{name}", getattr(self, name))
        object.__setattr__(self, name, value)  # the normalised value of a frozen field

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> Self:
        """Build from a dictionary; an unknown key is an error naming the nearest one."""
        for name in given:
            if name not in _NAMES:
                known = suggest(name, _NAMES)
                raise RequestError("constraint", f"unknown kind of constraint {name!r}. {known}")
        return cls(**given)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Build from JSON such as {"choice": ["yes", "no"]}."""
        given = _parsed("constraint", text)
        if not isinstance(given, dict):
            raise RequestError("constraint", f"expected an object, got {text!r:.80}.")
        return cls.from_mapping(given)

    @property
    def field(self) -> str:
        """What errors name."""
        return self.source or f"constraint.{self.kind}"

    @property
    def kind(self) -> str:
        """The field that is given."""
        return next(name for name in _NAMES if getattr(self, name) is not None)


_NAMES = ("json_schema", "regex", "choice", "grammar")


def _schema(field: str, value: object) -> str:
    if value is True:
        return ANY_OBJECT
    if isinstance(value, str):
        value = _parsed(field, _text(field, value))
    if not isinstance(value, Mapping):
        raise RequestError(field, f"expected a schema, its text or true, got {value!r:.80}.")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(field, f"is no JSON: {error}.") from error
    return _text(field, text)


def _parsed(field: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(field, f"is no JSON: {error}.") from error


def _text(field: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError(field, f"expected a text that is not empty, got {value!r:.80}.")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise RequestError(field, f"character {error.start + 1} is half a surrogate.") from error
    if size > MOST_BYTES:
        raise RequestError(field, f"has {size:,} bytes; allowed: up to {MOST_BYTES:,}.")
    return value


def _choice(field: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise RequestError(field, f"expected a list of texts, got {value!r:.80}.")
    if len(value) > MOST_CHOICES:
        raise RequestError(field, f"has {len(value):,} texts; allowed: up to {MOST_CHOICES:,}.")
    texts = tuple(dict.fromkeys(_text(field, text) for text in value))
    _text(field, "".join(texts))
    return texts


_READERS = {"json_schema": _schema, "regex": _text, "choice": _choice, "grammar": _text}
