"""Broken JSON of a tool call, mended where what was meant is plain; nothing is ever evaluated.

The rewriter goes through a text once and writes strict JSON. On what `json_scan.JsonScan` calls
certain it changes nothing, so that a repair goes on from what was given out already. It knows the
schema of the parameters: a word without quotes is a text only where a text may stand. What it
cannot make sense of, it leaves alone: None.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwenkit.chat.json_scan import MOST_LEVELS, is_object

Schema = Mapping[str, Any]

_CLOSERS = {"{": "}", "[": "]"}
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "`": "`"}
_GAP = re.compile(r"[\s\ufeff]*")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?(?:\*/|\Z)|#[^\n]*", re.DOTALL)
_KEY = re.compile(r"[^\W\d][\w$.-]*")
_WORD = re.compile(r"(?:(?!\s(?:/[/*]|#))[^,{}\[\]\"'\n\r])+")  # a comment may stand behind it
_NUMBER = re.compile(
    r"([-+]?)(0[xX][0-9a-fA-F]{1,16}|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)((?:[eE][-+]?[0-9]+)?)"
)
_STRICT_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_LITERALS = {
    **{"true": "true", "false": "false", "null": "null", "True": "true", "False": "false"},
    **{"None": "null", "TRUE": "true", "FALSE": "false", "NULL": "null", "NaN": "null"},
    **{"undefined": "null", "Infinity": "null", "-Infinity": "null"},
}
_STRING_PART = re.compile(r"[^\"'”’`\\\x00-\x1f]+")
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_AFTER_KEY = re.compile(r"[\s\ufeff]*(?::|\Z)")
_AFTER_VALUE = re.compile(r"[\s\ufeff]*(?:[,}\]]|//|/\*|\Z|[\"'][\w $.-]{1,64}[\"']\s{0,8}:)")
_TRIPLE = re.compile(r'"""|\'\'\'|```(?:[a-zA-Z0-9_+-]*\n)?')
_FENCE = re.compile(r"\s*```([a-zA-Z0-9_+-]*)[ \t]*\n?(.*?)(?:\n?```\s*|\Z)", re.DOTALL)


class _HopelessError(Exception):
    """Nobody can say what this text was to be."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """`text` is strict JSON, an object; `used` characters of the source went into it. `members` are
    the texts of its values by their keys, the source of each beside it.
    """

    text: str
    used: int
    members: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def repair_object(source: str, schema: Schema | None = None, *, start: int = 0) -> Repaired | None:
    """The object that begins with the brace at `start`, as strict JSON; None where it is hopeless.

    `schema` is that of the object, if there is one.
    """
    rewriter = _Rewriter(source, start)
    try:
        rewriter.object(schema or {}, 1)
    except _HopelessError:
        return None
    text = "".join(rewriter.out)
    if not is_object(text):
        return None
    return Repaired(text, rewriter.at - start, rewriter.members)


def repair_arguments(source: str, schema: Schema) -> str | None:
    """What a model wrote for a call's arguments, whatever its shape, as a JSON object that has the
    parameters of `schema`; None where that is hopeless.

    An object may stand in a fence of backticks or in a JSON string. Code or text by itself is the
    value of the one parameter that takes a text; nothing at all is the empty object where no
    parameter is required.
    """
    text = source.strip()
    if not text or text in ("None", "null", "{}"):
        return None if schema.get("required") else "{}"
    if text.startswith("{"):
        repaired = repair_object(text, schema)
        return None if repaired is None else repaired.text
    fence = _FENCE.fullmatch(text)
    inner = text if fence is None else fence[2]
    if fence is not None and inner.lstrip().startswith("{") and fence[1] in ("", "json", "json5"):
        return repair_arguments(inner, schema)
    if text.startswith('"'):
        inner = _unquoted(text)
        if inner.lstrip().startswith("{"):
            return repair_arguments(inner, schema)
    name = _text_parameter(schema)
    return None if name is None else json.dumps({name: inner}, ensure_ascii=False)


def _unquoted(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text


def _text_parameter(schema: Schema) -> str | None:
    """The name of the one parameter that a bare text can be meant for."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return None
    required = schema.get("required")
    names = [n for n in required if n in properties] if isinstance(required, list) else []
    names = names or list(properties)
    if len(names) != 1 or not takes_text(member(schema, names[0])):
        return None
    return str(names[0])


def member(schema: Schema, name: str) -> Schema:
    """The schema of a property; {} where it is not known."""
    properties = schema.get("properties")
    found = properties.get(name) if isinstance(properties, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _items(schema: Schema) -> Schema:
    found = schema.get("items")
    return found if isinstance(found, Mapping) else {}


def takes_text(schema: Schema) -> bool:
    """True where a text may stand: it is allowed, or nothing is said."""
    kind = schema.get("type")
    if isinstance(kind, list):
        return "string" in kind
    if kind is None and isinstance(schema.get("enum"), list):
        return any(isinstance(value, str) for value in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if kind is None and isinstance(schema.get(key), list):
            return any(isinstance(each, Mapping) and takes_text(each) for each in schema[key])
    return kind in (None, "string")


class _Rewriter:
    """One pass over a source, from `at` on; `out` is what was written."""

    def __init__(self, source: str, at: int) -> None:
        self.source, self.at = source, at
        self.out: list[str] = []
        self.members: dict[str, tuple[str, str]] = {}
        self._open: list[str] = []

    # -- objects and lists -----------------------------------------------------------------------

    def object(self, schema: Schema, level: int) -> None:
        """Rewrite an object; `at` is at its brace."""
        self._begin("{", level)
        while self._more():
            key = self._key()
            gap = self._gap()
            if self._peek() != ":":
                raise _HopelessError
            self.at += 1
            self.out.append(f"{gap}:{self._gap()}")
            value, begin = len(self.out), self.at
            self._value(member(schema, key), level)
            if level == 1:
                self.members[key] = "".join(self.out[value:]), self.source[begin : self.at]
        self._end()

    def list(self, schema: Schema, level: int) -> None:
        """Rewrite a list; `at` is at its bracket."""
        self._begin("[", level)
        while self._more():
            self._value(_items(schema), level)
        self._end()

    def _begin(self, bracket: str, level: int) -> None:
        if level > MOST_LEVELS:
            raise _HopelessError
        self._open.append(bracket)
        self.out.append(bracket)
        self.at += 1
        self._first = True

    def _more(self) -> bool:
        """Go to the next member, a comma written before it; False where the container ends."""
        first, self._first = self._first, False
        gap = self._gap()
        commas = 0
        while self._peek() == ",":
            self.at += 1
            commas += 1
            gap += ("," if commas == 1 and not first else "") + self._gap()
        closer = _CLOSERS[self._open[-1]]
        while self._peek() not in ("", closer) and self._closes_nothing(self._peek()):
            self.at += 1
            gap += self._gap()
        if self._peek() in ("", "}", "]"):
            self.out.append(gap.replace(",", "") if commas else gap)
            return False
        self.out.append(gap if commas or first else f",{gap or ' '}")
        return True

    def _closes_nothing(self, sign: str) -> bool:
        return sign in "}]" and all(_CLOSERS[bracket] != sign for bracket in self._open)

    def _end(self) -> None:
        """Close the container; another one's closer, and the end of the source, close it too."""
        closer = _CLOSERS[self._open.pop()]
        if self._peek() == closer:
            self.at += 1
        self.out.append(closer)
        self._first = False

    # -- what stands in them ---------------------------------------------------------------------

    def _key(self) -> str:
        character = self._peek()
        if character in _QUOTES:
            begin = len(self.out)
            self._string(_AFTER_KEY)
            return str(json.loads("".join(self.out[begin:])))
        match = _KEY.match(self.source, self.at)
        if match is None:
            raise _HopelessError
        self.at = match.end()
        self.out.append(json.dumps(match[0], ensure_ascii=False))
        return match[0]

    def _value(self, schema: Schema, level: int) -> None:
        character = self._peek()
        if character == "{":
            self.object(schema, level + 1)
        elif character == "[":
            self.list(schema, level + 1)
        elif _TRIPLE.match(self.source, self.at):
            self._block()
        elif character in _QUOTES:
            self._string(_AFTER_VALUE)
        elif character in ("", ",", "}", "]"):
            self.out.append("null")
        else:
            self._bare(schema)

    def _block(self) -> None:
        """A text in three quotes or backticks, to the next three."""
        mark = _TRIPLE.match(self.source, self.at)
        assert mark is not None, "the caller looked"
        quotes = mark[0][:3]
        if quotes == '"""' and _AFTER_VALUE.match(self.source, self.at + 2):
            self._string(_AFTER_VALUE)  # an empty text, and what follows it
            return
        end = self.source.find(quotes, mark.end())
        end = len(self.source) if end < 0 else end
        text = self.source[mark.end() : end].removesuffix("\n" if quotes == "```" else "")
        self.out.append(json.dumps(text, ensure_ascii=False))
        self.at = end + 3 if end < len(self.source) else end

    def _string(self, after: re.Pattern[str]) -> None:
        """A text in quotes of any kind. It ends with the first quote that something may follow."""
        quote = _QUOTES[self._peek()]
        self.at += 1
        self.out.append('"')
        inner = 0  # quotes that may not have been its end
        while self.at < len(self.source):
            part = _STRING_PART.match(self.source, self.at)
            if part is not None:
                self.out.append(part[0])
                self.at = part.end()
                continue
            character = self.source[self.at]
            self.at += 1
            if character == quote and after.match(self.source, self.at):
                break
            if character == "\\":
                self._escape(quote)
            else:
                inner += character == quote
                self.out.append(_escaped(character))
        else:
            if inner:
                raise _HopelessError
        self.out.append('"')

    def _escape(self, quote: str) -> None:
        """`at` is behind a backslash."""
        strict = _ESCAPE.match(self.source, self.at - 1)
        if strict is not None:
            self.out.append(strict[0])
            self.at = strict.end()
            return
        following = self._peek()
        if following == "\n":  # the line goes on
            self.at += 1
        elif following and following in f"{quote}'`":
            self.out.append(_escaped(following))
            self.at += 1
        else:
            self.out.append("\\\\")

    def _bare(self, schema: Schema) -> None:
        """A number, a word that JSON or another language knows, or a text without quotes."""
        match = _WORD.match(self.source, self.at)
        if match is None:
            raise _HopelessError
        word = match[0].strip()
        if _STRICT_NUMBER.fullmatch(word):
            written = word
        elif word in _LITERALS:
            written = _LITERALS[word]
        elif (number := _NUMBER.fullmatch(word)) and not _only_text(schema):
            written = _number(number)
        elif word and takes_text(schema):
            written = json.dumps(word, ensure_ascii=False)
        else:
            raise _HopelessError
        self.at += len(match[0].rstrip())
        self.out.append(written)

    def _gap(self) -> str:
        """White space between two signs, comments left out."""
        spaces = []
        while True:
            space = _GAP.match(self.source, self.at)
            assert space is not None, "it matches nothing too"
            spaces.append(space[0])
            self.at = space.end()
            comment = _COMMENT.match(self.source, self.at)
            if comment is None:
                return "".join(c for c in "".join(spaces) if c in " \t\n\r")
            self.at = comment.end()

    def _peek(self) -> str:
        return self.source[self.at : self.at + 1]


def _escaped(character: str) -> str:
    return json.dumps(character, ensure_ascii=False)[1:-1]


def _only_text(schema: Schema) -> bool:
    return schema.get("type") == "string"


def _number(match: re.Match[str]) -> str:
    """A number that JSON would write otherwise."""
    sign, digits, exponent = match.groups()
    sign = sign.replace("+", "")
    if digits[:2] in ("0x", "0X"):
        return sign + str(int(digits, 16)) + exponent
    whole, point, rest = digits.partition(".")
    whole = whole.lstrip("0") or "0"
    return sign + whole + (f".{rest}" if point and rest else "") + exponent
