"""The values of one running chat template: how they print, and how much they may cost.

A template is somebody else's program. It is stopped by the processor time it has used, by the
characters it has made and by the size of the lists it builds, all looked at before or right after
each operation, so that no single step is large either. The limits grow with the conversation.
Knows nothing of Jinja.
"""

from __future__ import annotations

import json
import operator
import re
import string
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from time import thread_time
from typing import Any

from qwenkit.chat.guard import Guard, Guarded
from qwenkit.errors import TemplateError

_MAX_INDENT = 16
_MAX_NUMBER_BITS = 4096
_ITEM_CHARACTERS = 8  # what an item of a list counts for, next to characters, by its memory
_PERCENT_FIELD = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")
_NOT_ASCII = re.compile(r"[^\x00-\x7e]")
Scalar = int | float | None
_COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
    "in": lambda item, container: item in container,
    "notin": lambda item, container: item not in container,
}
COMPARISON_TESTS: Mapping[str, str] = {
    **{name: name for name in ("eq", "ne", "lt", "gt", "in")},
    **{"==": "eq", "equalto": "eq", "!=": "ne", "<": "lt", "lessthan": "lt", "<=": "lteq"},
    **{"le": "lteq", ">": "gt", "greaterthan": "gt", ">=": "gteq", "ge": "gteq"},
}
"""Names of Jinja's comparing tests → names of its comparing operators."""


def length(value: object) -> int:
    """How many items or characters a value has by itself; 0 for a single thing."""
    return len(value) if isinstance(value, str | list | tuple | dict | range) else 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one rendering may use: processor seconds, characters made in all (an item of a list
    counts for eight), and the characters and items of a single value.
    """

    seconds: float
    characters: int
    value_characters: int
    value_items: int

    @classmethod
    def for_conversation(cls, *, texts: int, characters: int) -> Limits:
        """Limits for a conversation of so many texts (contents, names, arguments, keys)."""
        return cls(
            seconds=0.8 + 5e-4 * texts + 1e-6 * characters,
            # A template may copy each text a few times, and one that collects the conversation
            # in a variable copies what it has so far once per message.
            characters=600_000 + characters * (64 + texts),
            value_characters=300_000 + characters * 8,
            value_items=50_000 + 20 * texts,
        )


@dataclass(frozen=True, slots=True)
class Size:
    """A value with everything inside it, shared parts counted as often as they print."""

    items: int
    characters: int
    depth: int
    opaque: str | None


class JsonObject(dict[Any, Any]):
    """A JSON object that came as text, for templates written for either: it has items, and where
    text is wanted it is `source`.
    """

    __slots__ = ("source",)

    def __init__(self, items: Mapping[Any, Any], source: str) -> None:
        super().__init__(items)
        self.source = source


class Run:
    """The state of one rendering. All methods raise TemplateError when a limit is passed."""

    __slots__ = ("_blank", "_end_s", "_escapes", "_left", "_limits", "_pending", "guard")

    def __init__(self, guard: Guard, limits: Limits, *, blank: tuple[type, ...] = ()) -> None:
        """Values of the `blank` types print as nothing."""
        self.guard = guard
        self._blank = blank
        self._limits = limits
        self._left = limits.characters
        self._end_s = thread_time() + limits.seconds
        self._pending = 0
        self._escapes: re.Pattern[str] | None = None

    # -- limits ----------------------------------------------------------------------------------

    def spend(self, amount: int = 0) -> None:
        """Count one operation over `amount` items or characters and look at the clock in time."""
        self._pending += 1 + amount // 64
        if self._pending >= 32:  # reading the clock costs as much as a few operations
            self._pending = 0
            if thread_time() > self._end_s:
                raise TemplateError(
                    f"the chat template ran for more than {self._limits.seconds:.1f} s of "
                    "processor time. Use a template without long loops."
                )

    def made(self, characters: int) -> None:
        """Count newly made text."""
        self.spend(characters)
        self._left -= characters
        if self._left < 0:
            raise TemplateError(
                f"the chat template made more than {self._limits.characters:,} characters of "
                "text and lists, the most for a conversation of this size."
            )

    def size(self, value: object) -> Size:
        """Measure a value. The clock and the limit on items hold while measuring."""
        items = characters = depth = 0
        opaque: str | None = None
        stack: list[tuple[object, int]] = [(value, 1)]
        while stack:
            item, level = stack.pop()
            items += 1
            depth = max(depth, level)
            if isinstance(item, str):
                characters += len(item)
            elif isinstance(item, list | tuple):
                stack.extend((inner, level + 1) for inner in item)
            elif isinstance(item, dict):
                stack.extend((inner, level + 1) for pair in item.items() for inner in pair)
            elif not isinstance(item, int | float | range | None):
                opaque = type(item).__name__
            self.guard.check_items(items + len(stack))
        self.spend(items * 8)
        return Size(items, characters, depth, opaque)

    def admit(self, value: Any) -> Any:
        """Take a new value into the template's world, or refuse it for its size."""
        if isinstance(value, str):
            self.made(len(value))
        elif isinstance(value, list | tuple | dict):
            self.guard.check_length(self.size(value).characters)
            self.made(len(value) * _ITEM_CHARACTERS)
        elif isinstance(value, Iterator | KeysView | ItemsView | ValuesView):
            return self.admit(list(value))
        return value

    # -- printing --------------------------------------------------------------------------------

    def text(self, value: object) -> str:
        """What a template prints for a value: Python's `str`, for plain data only."""
        if isinstance(value, str):
            return value
        if isinstance(value, int | float | range | None):
            return str(value)
        if isinstance(value, self._blank):
            return ""
        if isinstance(value, JsonObject):
            return value.source
        size = self._printable_size(value)
        self.guard.check_length(size.characters * 2 + size.items * 4)
        return self.guard.own(str(value))

    def _printable_size(self, value: object) -> Size:
        size = self.size(value)
        if size.opaque is not None:
            raise TemplateError(
                "a chat template can print text, numbers, lists and dictionaries, not a value of "
                f"type {size.opaque}."
            )
        return size

    def json(
        self,
        value: object,
        *,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> Guarded:
        """The value as JSON, as `json.dumps` writes it; what came from outside stays marked."""
        size = self._printable_size(value)
        width = indent if isinstance(indent, int) else len(indent or "")
        around = sum(map(len, separators or (", ", ": ")))
        if width > _MAX_INDENT or around > 2 * _MAX_INDENT:
            raise TemplateError(f"tojson: an indent may have {_MAX_INDENT} columns, got {width}.")
        per_item = 4 + around + (size.depth * width if indent is not None else 0)
        self.guard.check_length(size.characters * 2 + size.items * per_item)
        # Marked characters are none that JSON escapes, so they pass; they are escaped afterwards.
        raw = json.dumps(
            value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
        )
        pattern = _NOT_ASCII if ensure_ascii else self._marked_specials()
        return self.guard.own(pattern.sub(self._escaped, raw))

    def _marked_specials(self) -> re.Pattern[str]:
        if self._escapes is None:
            low, high, others = map(self.guard.mark, ("\x00", "\x1f", '"\\'))
            self._escapes = re.compile(f"[{low}-{high}{others}]")
        return self._escapes

    def _escaped(self, match: re.Match[str]) -> str:
        character = match[0]
        plain = self.guard.plain(character)
        escaped = json.dumps(plain)[1:-1]
        if escaped == plain:
            return character
        ours = plain == character and plain <= "\uffff"
        return escaped if ours else self.guard.mark(escaped)

    # -- formatting ------------------------------------------------------------------------------

    def percent(self, template: str, values: object) -> Guarded:
        """`template % values`, with widths of at most three digits."""
        for match in _PERCENT_FIELD.finditer(template):
            if any(width == "*" or len(width) > 3 for width in match.groups() if width):
                raise TemplateError(f"the field {match[0]!r} of a format is too wide.")
        arguments: object
        if isinstance(values, tuple):
            arguments = tuple(map(self._printed, values))
        elif isinstance(values, dict):
            arguments = {key: self._printed(value) for key, value in values.items()}
        else:
            arguments = self._printed(values)
        return self.guard.own(str.__mod__(str.__str__(template), arguments))

    def braces(self, template: str, *args: object, **kwargs: object) -> Guarded:
        """`template.format(…)` with plain fields: no attributes, no items, no wide widths."""
        formatter = _Formatter()
        values = [self._printed(value) for value in args]
        named = {name: self._printed(value) for name, value in kwargs.items()}
        return self.guard.own(formatter.vformat(str.__str__(template), values, named))

    def _printed(self, value: object) -> str | Scalar:
        return value if isinstance(value, int | float | None) else self.text(value)

    # -- comparing and arithmetic ------------------------------------------------------------------

    def compare(self, name: str, left: Any, right: Any) -> Any:
        """One comparison, by Jinja's name of the operator."""
        self.spend(length(left) + length(right))
        if name in ("in", "notin") and isinstance(right, str):
            right = self.guard.own(right)
        return _COMPARISONS[name](left, right)

    def added(self, left: Any, right: Any) -> Any:
        """`left + right`."""
        if isinstance(left, str) and isinstance(right, str | JsonObject):
            return self.admit(self.guard.own(left) + self.text(right))
        if isinstance(left, JsonObject) and isinstance(right, str):
            return self.admit(self.guard.own(left.source) + right)
        return self.admit(left + right)

    def repeated(self, left: Any, right: Any) -> Any:
        """`left * right` after a look at the size of the result."""
        for value, count in ((left, right), (right, left)):
            if isinstance(value, str | list | tuple) and isinstance(count, int):
                self.guard.check_length(len(value) * count)
                owned = self.guard.own(value) if isinstance(value, str) else value
                return self.admit(owned * count)
        self._check_bits(sum(n.bit_length() for n in (left, right) if isinstance(n, int)))
        return left * right

    def power(self, left: Any, right: Any) -> Any:
        """`left ** right` after a look at the size of the result."""
        if isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() * abs(right))
        return left**right

    def _check_bits(self, bits: int) -> None:
        if bits > _MAX_NUMBER_BITS:
            raise TemplateError("the chat template builds a number of thousands of digits.")


class _Formatter(string.Formatter):
    def get_field(
        self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, int | str]:
        if re.search(r"[.\[]", field_name):
            raise TemplateError(f"the format field {field_name!r} reaches into a value.")
        result: tuple[Any, int | str] = super().get_field(field_name, args, kwargs)
        return result

    def format_field(self, value: Any, format_spec: str) -> str:
        if re.search(r"\d{4}", format_spec):
            raise TemplateError(f"the format {format_spec!r} is too wide.")
        return format(value, format_spec)
