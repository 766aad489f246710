"""JSON as it comes: how far a text is one strict JSON object, and what of it can be given out.

The text of a call's arguments is given out while a model writes it, and what was given out is never
taken back. So a scan tells, beside where the object ends or is no JSON any more, how much of it
will stay as it is whatever follows, even where the rest must be repaired (`json_repair`).
"""

from __future__ import annotations

import re

MOST_LEVELS = 128
"""Objects and lists within one another; deeper ones count as broken."""

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SPACE = " \t\n\r"
_HEX = frozenset("0123456789abcdefABCDEF")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")
_SCALAR_PART = re.compile(r"[-+.0-9a-zA-Z]*")


class JsonScan:
    """Follows one object of RFC 8259 through pieces of any size; time is linear in their length.

    `length` characters were taken; the first `certain` of them are the beginning of any repaired
    text too: a comma is not certain before what it separates, a string's end not before what may
    follow it. `levels` is how many objects and lists are open.
    """

    __slots__ = (
        "_expected",
        "_is_key",
        "_open",
        "_scalar",
        "broken",
        "certain",
        "complete",
        "length",
    )

    def __init__(self) -> None:
        self.length = 0
        self.certain = 0
        self.complete = False
        self.broken = False
        self._expected = "object"
        self._open: list[str] = []
        self._is_key = False
        self._scalar: list[str] = []

    @property
    def levels(self) -> int:
        """How many objects and lists are open."""
        return len(self._open)

    def feed(self, text: str, *, levels: int | None = None) -> int:
        """Take characters up to the object's end, the first that cannot be in it, or the one that
        opens so many `levels`; return how many.
        """
        at = 0
        while at < len(text) and not (self.complete or self.broken):
            taken = self._take(text, at)
            self.length += taken
            at += taken
            if taken and self.levels == levels and self._expected in ("first key", "first value"):
                break
        return at

    def _take(self, text: str, at: int) -> int:
        expected = self._expected
        if expected == "in string":
            return self._in_string(text, at)
        if expected == "in scalar":
            return self._in_scalar(text, at)
        character = text[at]
        if expected == "escape" or expected.isdigit():
            return self._in_escape(character)
        if character in _SPACE:
            return 1
        return self._structure(character)

    def _in_string(self, text: str, at: int) -> int:
        plain = _PLAIN.match(text, at)
        assert plain is not None, "it matches nothing too"
        taken = plain.end() - at
        if taken:
            self.certain = self.length + taken
        elif text[at] == "\\":
            self._expected, taken = "escape", 1
        elif text[at] == '"':
            self._expected, taken = ("colon" if self._is_key else "next"), 1
        else:
            self.broken = True
        return taken

    def _in_escape(self, character: str) -> int:
        if self._expected == "escape":
            if character == "u":
                self._expected = "4"
                return 1
            self.broken = character not in '"\\/bfnrt'
        elif character in _HEX:
            left = int(self._expected) - 1
            if left:
                self._expected = str(left)
                return 1
        else:
            self.broken = True
        if self.broken:
            return 0
        self._expected = "in string"
        self.certain = self.length + 1
        return 1

    def _in_scalar(self, text: str, at: int) -> int:
        part = _SCALAR_PART.match(text, at)
        assert part is not None, "it matches nothing too"
        if part[0]:
            self._scalar.append(part[0])
        if part.end() < len(text):
            self.broken = _SCALAR.fullmatch("".join(self._scalar)) is None
            self._scalar.clear()
            self._expected = "next"
        return len(part[0])

    def _structure(self, character: str) -> int:
        expected, before = self._expected, self.length
        if character == '"' and expected in ("key", "first key", "value", "first value"):
            self._is_key = "key" in expected
            self._expected, self.certain = "in string", before + 1
        elif character == "{" and expected in ("object", "value", "first value"):
            self._descend(character, "first key")
        elif character == "[" and expected in ("value", "first value"):
            self._descend(character, "first value")
        elif character == ":" and expected == "colon":
            self._expected, self.certain = "value", before + 1
        elif character == "," and expected == "next":
            self._expected = "key" if self._open[-1] == "{" else "value"
            self.certain = before
        elif self._closes(character):
            self._open.pop()
            self._expected, self.certain = "next", before + 1
            self.complete = not self._open
        elif expected in ("value", "first value") and character in "-0123456789tfn":
            self._expected, self.certain = "in scalar", before
            return 0
        else:
            self.broken = True
            return 0
        return 0 if self.broken else 1

    def _descend(self, character: str, expected: str) -> None:
        self.broken = self.levels == MOST_LEVELS
        if not self.broken:
            self._open.append(character)
            self._expected, self.certain = expected, self.length + 1

    def _closes(self, character: str) -> bool:
        if character == "}":
            return self._expected == "first key" or (
                self._expected == "next" and self._open[-1] == "{"
            )
        return character == "]" and (
            self._expected == "first value" or (self._expected == "next" and self._open[-1] == "[")
        )


def is_object(text: str) -> bool:
    """True where `text` is one strict JSON object and nothing else."""
    scan = JsonScan()
    return scan.feed(text) == len(text) and scan.complete
