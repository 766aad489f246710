"""Text that remembers, character by character, whether a template or somebody else wrote it.

Before a conversation is given to a chat template, every character of it that could take part in a
control token is moved to a Unicode plane that occurs nowhere in the conversation (the mapping is
one to one, so lengths and positions stay). What the template writes itself stays where it is.
After rendering, a control token is only where all of its characters are the template's own;
then the moved characters are moved back. A string that loses its type on the way keeps its moved
characters, so it can never become a control token: it fails safe.

`Guarded` is a `str` of such characters that behaves as the text it stands for: comparing,
searching, splitting and changing case see the plain text, and the pieces keep their marks. It
must not know Jinja, tokenizers or message formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Set
from typing import Any, Literal, Self, SupportsIndex

from qwenkit.errors import RequestError, TemplateError

# Private use first, then planes in which no character is assigned, then real ones.
_SPARE_PLANES = (15, 16, *range(4, 15), 3, 2, 1)


def planes(text: str) -> set[int]:
    """The Unicode planes (code point ÷ 65,536) that occur in `text`."""
    if text.isascii():
        return {0}
    return set(_utf32(text)[2::4])


def _utf32(text: str) -> bytes:
    return text.encode("utf-32-le", "surrogatepass")


def _move(text: str, table: bytes) -> str:
    """`text` with the plane of every character looked up in a table of 256 planes."""
    data = bytearray(_utf32(text))
    data[2::4] = data[2::4].translate(table)  # the third byte of a UTF-32 unit is the plane
    return data.decode("utf-32-le", "surrogatepass")


class Guard:
    """One rendering's mapping between plain and marked text, and the size no value may pass.

    `control_tokens` are the texts to protect, `given` all planes of the texts that will be marked,
    `own` all planes of texts that will not (the template's). Raises RequestError when no plane is
    left over, which takes characters of every unassigned plane in one conversation.
    """

    __slots__ = ("_back", "_forth", "_max_characters", "_max_items")

    def __init__(
        self,
        control_tokens: Iterable[str],
        *,
        given: Set[int],
        own: Set[int],
        max_characters: int,
        max_items: int,
    ) -> None:
        protected = planes("".join(control_tokens)) | {0}
        free = [p for p in _SPARE_PLANES if p not in given | own | protected]
        if len(free) < len(protected):
            raise RequestError(
                "messages",
                "characters of every Unicode plane, the unassigned ones too, leave no code points "
                "to tell control tokens from text. Remove the characters above U+3FFFF.",
            )
        forth, back = bytearray(range(256)), bytearray(range(256))
        for plane, spare in zip(sorted(protected), free, strict=False):
            forth[plane], back[spare] = spare, plane
        self._forth, self._back = bytes(forth), bytes(back)
        self._max_characters, self._max_items = max_characters, max_items

    def mark(self, text: str) -> str:
        """Plain text → marked text of the same length."""
        return _move(text, self._forth)

    def plain(self, text: str) -> str:
        """Any text, marked in part or not → the plain text it stands for."""
        if isinstance(text, Guarded):
            return text.plain
        return text if text.isascii() else _move(text, self._back)

    def guarded(self, text: str) -> Guarded:
        """Plain text of foreign origin as a value for the template."""
        value = Guarded(self.mark(text), self)
        value._plain = str(text)
        return value

    def own(self, text: str) -> Guarded:
        """Text that is marked already, or the template's own, as a value with guarded methods."""
        return text if isinstance(text, Guarded) else Guarded(text, self)

    def check_length(self, characters: int) -> None:
        """Raises TemplateError before a text of that length is made."""
        if characters > self._max_characters:
            raise TemplateError(
                f"the chat template builds a text of {characters:,} characters; allowed for this "
                f"conversation: {self._max_characters:,}."
            )

    def check_items(self, items: int) -> None:
        """Raises TemplateError before, or while, a value of so many parts is made."""
        if items > self._max_items:
            raise TemplateError(
                f"the chat template builds a value of more than {self._max_items:,} parts, the "
                "most for a conversation of this size."
            )


class Guarded(str):
    """Marked text; see the module's docstring. Methods take plain or marked arguments."""

    __slots__ = ("_guard", "_plain")
    _guard: Guard
    _plain: str | None

    def __new__(cls, marked: str, guard: Guard) -> Self:
        value = str.__new__(cls, marked)
        value._guard, value._plain = guard, None
        return value

    @property
    def plain(self) -> str:
        """The text this stands for."""
        if self._plain is None:
            raw = str.__str__(self)
            self._plain = raw if raw.isascii() else _move(raw, self._guard._back)
        return self._plain

    def _own(self, marked: str) -> Guarded:
        return Guarded(marked, self._guard)

    def _cut(self, start: int, stop: int) -> Guarded:
        return self._own(str.__getitem__(self, slice(start, stop)))

    def _other(self, text: object) -> str:
        if not isinstance(text, str):
            raise TypeError(f"expected text, got {type(text).__name__}")
        return self._guard.plain(text)

    # -- what it is ------------------------------------------------------------------------------

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        return self._own(self._guard.mark(repr(self.plain)))

    def __hash__(self) -> int:
        return hash(self.plain)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self.plain == self._guard.plain(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: str) -> bool:
        return self.plain < self._other(other)

    def __le__(self, other: str) -> bool:
        return self.plain <= self._other(other)

    def __gt__(self, other: str) -> bool:
        return self.plain > self._other(other)

    def __ge__(self, other: str) -> bool:
        return self.plain >= self._other(other)

    def __contains__(self, text: object) -> bool:
        return self._other(text) in self.plain

    def __iter__(self) -> Iterator[str]:
        return (self._own(character) for character in str.__iter__(self))

    def __getitem__(self, index: SupportsIndex | slice[Any, Any, Any]) -> Guarded:
        return self._own(str.__getitem__(self, index))

    def __add__(self, other: str) -> Guarded:
        if not isinstance(other, str):
            return NotImplemented
        self._guard.check_length(len(self) + len(other))
        return self._own(str.__add__(self, other))

    def __radd__(self, other: str) -> Guarded:
        return self._own(other) + self if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> Guarded:
        self._guard.check_length(len(self) * count.__index__())
        return self._own(str.__mul__(self, count))

    __rmul__ = __mul__

    # -- questions about the plain text ----------------------------------------------------------

    def startswith(self, prefix: str | tuple[str, ...], *bounds: Any) -> bool:
        """As `str.startswith`."""
        return self.plain.startswith(self._each(prefix), *bounds)

    def endswith(self, suffix: str | tuple[str, ...], *bounds: Any) -> bool:
        """As `str.endswith`."""
        return self.plain.endswith(self._each(suffix), *bounds)

    def _each(self, texts: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return tuple(map(self._other, texts)) if isinstance(texts, tuple) else self._other(texts)

    def find(self, text: str, *bounds: Any) -> int:
        """As `str.find`."""
        return self.plain.find(self._other(text), *bounds)

    def rfind(self, text: str, *bounds: Any) -> int:
        """As `str.rfind`."""
        return self.plain.rfind(self._other(text), *bounds)

    def index(self, text: str, *bounds: Any) -> int:
        """As `str.index`."""
        return self.plain.index(self._other(text), *bounds)

    def count(self, text: str, *bounds: Any) -> int:
        """As `str.count`."""
        return self.plain.count(self._other(text), *bounds)

    def isalpha(self) -> bool:
        """As `str.isalpha`."""
        return self.plain.isalpha()

    def isdigit(self) -> bool:
        """As `str.isdigit`."""
        return self.plain.isdigit()

    def isspace(self) -> bool:
        """As `str.isspace`."""
        return self.plain.isspace()

    def islower(self) -> bool:
        """As `str.islower`."""
        return self.plain.islower()

    def isupper(self) -> bool:
        """As `str.isupper`."""
        return self.plain.isupper()

    # -- pieces of it ----------------------------------------------------------------------------

    def strip(self, chars: str | None = None) -> Guarded:
        """As `str.strip`."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> Guarded:
        """As `str.lstrip`."""
        kept = self.plain.lstrip(None if chars is None else self._other(chars))
        return self._cut(len(self) - len(kept), len(self))

    def rstrip(self, chars: str | None = None) -> Guarded:
        """As `str.rstrip`."""
        kept = self.plain.rstrip(None if chars is None else self._other(chars))
        return self._cut(0, len(kept))

    def removeprefix(self, prefix: str) -> Guarded:
        """As `str.removeprefix`."""
        return self._cut(len(prefix) if self.startswith(prefix) else 0, len(self))

    def removesuffix(self, suffix: str) -> Guarded:
        """As `str.removesuffix`."""
        return self._cut(0, len(self) - (len(suffix) if self.endswith(suffix) else 0))

    def partition(self, sep: str) -> tuple[Guarded, Guarded, Guarded]:
        """As `str.partition`."""
        at = self.find(sep)
        if at < 0:
            return self, self._own(""), self._own("")
        end = at + len(sep)
        return self._cut(0, at), self._cut(at, end), self._cut(end, len(self))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As `str.split`."""
        return self._pieces("split", sep, maxsplit)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As `str.rsplit`."""
        return self._pieces("rsplit", sep, maxsplit)

    def _pieces(
        self, how: Literal["split", "rsplit"], sep: str | None, maxsplit: SupportsIndex
    ) -> list[str]:
        """The plain text's pieces, cut out of the marked text at the same places."""
        plain, gap = self.plain, 0 if sep is None else len(sep)
        parts = getattr(plain, how)(None if sep is None else self._other(sep), maxsplit)
        self._guard.check_items(len(parts))
        pieces: list[str] = []
        position = 0
        for part in parts:
            # Only white space lies between here and the next piece when there is no separator.
            start = plain.find(part, position) if sep is None else position
            pieces.append(self._cut(start, start + len(part)))
            position = start + len(part) + gap
        return pieces

    def splitlines(self, keepends: bool = False) -> list[str]:
        """As `str.splitlines`."""
        lines, pieces, start = self.plain.splitlines(True), list[str](), 0
        self._guard.check_items(len(lines))
        for whole, bare in zip(lines, self.plain.splitlines(), strict=True):
            pieces.append(self._cut(start, start + len(whole if keepends else bare)))
            start += len(whole)
        return pieces

    # -- new text --------------------------------------------------------------------------------

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Guarded:
        """As `str.replace`; the replacement keeps its own marks."""
        limit = count.__index__()
        pattern, number = re.compile(re.escape(self._other(old))), self.count(old)
        if limit == 0:
            return self
        number = number if limit < 0 else min(number, limit)
        self._guard.check_length(len(self) + number * (len(new) - len(old)))
        pieces: list[str] = []
        previous = 0
        for found, match in enumerate(pattern.finditer(self.plain)):
            if found == number:
                break
            pieces += (str.__getitem__(self, slice(previous, match.start())), new)
            previous = match.end()
        pieces.append(str.__getitem__(self, slice(previous, None)))
        return self._own("".join(pieces))

    def join(self, items: Iterable[str]) -> Guarded:
        """As `str.join`."""
        texts = list(items)
        length = sum(map(len, texts)) + len(self) * max(len(texts) - 1, 0)
        self._guard.check_length(length)
        return self._own(str.join(self, texts))

    def upper(self) -> Guarded:
        """As `str.upper`."""
        return self._recased(self.plain.upper())

    def lower(self) -> Guarded:
        """As `str.lower`."""
        return self._recased(self.plain.lower())

    def capitalize(self) -> Guarded:
        """As `str.capitalize`."""
        return self._recased(self.plain.capitalize())

    def title(self) -> Guarded:
        """As `str.title`."""
        return self._recased(self.plain.title())

    def _recased(self, plain: str) -> Guarded:
        """The text in another case: a character is the template's only where it was before."""
        marked = self._guard.mark(plain)
        if len(plain) != len(self):  # "ß" became "SS": positions no longer tell who wrote what
            return self._own(marked)
        olds = zip(str.__iter__(self), self.plain, strict=True)
        return self._own(
            "".join(
                new if old == old_plain and old_plain <= "\uffff" else new_marked
                for (old, old_plain), new, new_marked in zip(olds, plain, marked, strict=True)
            )
        )


# The methods above: the ones that see the plain text and keep the marks.
TEXT_METHODS = frozenset(
    name for name, member in vars(Guarded).items() if callable(member) and name[0] != "_"
)
