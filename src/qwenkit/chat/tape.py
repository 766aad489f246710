"""The text of a reply on its way through a dialect's grammar, and the deltas that come of it.

Text comes in pieces of any size. A grammar takes it without looking at where they begin and end.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

from qwenkit.types.deltas import (
    CallArguments,
    CallEnd,
    CallStart,
    ContentDelta,
    ReasoningDelta,
    ReplyDelta,
)
from qwenkit.types.messages import Tool

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A part of a grammar: yields where it needs more text, returns what it found."""

_BLOCK = 4_096  # characters: what is put back behind a mark is no more than that
_LONGEST_SPACE = 64  # white space that is held back as what may stand in front of a call


class Tape:
    """One reply: the text that a grammar has not taken yet, and the deltas that it has made.

    `start` is what of the reply stands in the prompt already. Without `parallel` only the first
    call counts as one.
    """

    def __init__(
        self, tools: Sequence[Tool] = (), *, parallel: bool = True, start: str = ""
    ) -> None:
        self.tools: Mapping[str, Tool] = {tool.name: tool for tool in tools}
        self.start = start
        self.cut_off = False
        self.lead = ""  # said where the next call begins
        self._parallel = parallel
        self._input: deque[str] = deque()
        self._ended = False
        self._absent: set[str] = set()
        self._deltas: list[ReplyDelta] = []
        self._space = ""
        self._said = False
        self._calls = 0

    # -- the text --------------------------------------------------------------------------------

    def add(self, text: str) -> None:
        """More text has come."""
        self._input.extend(_blocks(text))

    def finish(self, *, complete: bool) -> None:
        """No more text comes; `complete` where the model itself ended it."""
        self._ended, self.cut_off = True, not complete

    def chunk(self) -> Steps[str | None]:
        """Take some of the text, whatever is there; None at its end."""
        while not self._input:
            if self._ended:
                return None
            yield
        return self._input.popleft()

    def put_back(self, text: str) -> None:
        """Take it later."""
        self._input.extendleft(reversed(_blocks(text)))

    def until(self, markers: tuple[str, ...], give: Callable[[str], None]) -> Steps[str | None]:
        """Give the text up to the first of `markers`; take and return that, or None at the end.

        No marker may be the beginning of another one.
        """
        held = ""
        while (chunk := (yield from self.chunk())) is not None:
            text = held + chunk
            found = any_of(markers).search(text)
            if found is not None:
                give(text[: found.start()])
                self.put_back(text[found.end() :])
                return found[0]
            keep = overlap(text, markers)
            held = text[len(text) - keep :]
            give(text[: len(text) - keep])
        give(held)
        self._absent.update(markers)
        return None

    def is_absent(self, marker: str) -> bool:
        """True where the text was searched for a marker to its end and there was none."""
        return marker in self._absent

    def skip(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Take and return characters while `pattern`, which says of each by itself whether it
        belongs, matches.
        """
        taken: list[str] = []
        while (chunk := (yield from self.chunk())) is not None:
            found = pattern.match(chunk)
            size = 0 if found is None else found.end()
            taken.append(chunk[:size])
            if size < len(chunk):
                self.put_back(chunk[size:])
                break
        return "".join(taken)

    def expect(self, literal: str, *, or_cut: bool = False) -> Steps[bool]:
        """Take `literal` if it comes next; else nothing. With `or_cut` its beginning will do where
        the reply was cut off.
        """
        taken = ""
        while len(taken) < len(literal) and literal.startswith(taken):
            chunk = yield from self.chunk()
            if chunk is None:
                break
            taken += chunk
        found = taken.startswith(literal)
        if or_cut and self.cut_off and literal.startswith(taken):
            return True
        self.put_back(taken[len(literal) :] if found else taken)
        return found

    def ended(self) -> Steps[bool]:
        """Whether nothing more comes."""
        chunk = yield from self.chunk()
        self.put_back(chunk or "")
        return chunk is None

    # -- the deltas ------------------------------------------------------------------------------

    def take_deltas(self) -> tuple[ReplyDelta, ...]:
        """What was made since the last time."""
        made, self._deltas = tuple(self._deltas), []
        return made

    @property
    def may_call(self) -> bool:
        """False where a call would be one too many, or there is nothing to call."""
        return bool(self.tools) and (self._parallel or not self._calls)

    def say(self, text: str) -> None:
        """Text of the answer. White space is held back until something follows it."""
        text = self._space + text
        size = len(text.rstrip())
        size = max(size, len(text) - _LONGEST_SPACE)
        self._space = text[size:]
        if size:
            self._said = True
            self._deltas.append(ContentDelta(text[:size]))

    def think(self, text: str) -> None:
        """Text of a thought."""
        if text:
            self._deltas.append(ReasoningDelta(text))

    def open_call(self, name: str) -> int:
        """A call begins; return its number. The line break in front of it is no text."""
        space = self._space.removesuffix("\n") if self._said else ""
        if space + self.lead:
            self._deltas.append(ContentDelta(space + self.lead))
        self.lead = ""
        self._space, self._said = "", False
        self._deltas.append(CallStart(self._calls, name))
        self._calls += 1
        return self._calls - 1

    def write_arguments(self, call: int, text: str) -> None:
        """More of a call's arguments."""
        if text:
            self._deltas.append(CallArguments(call, text))

    def close_call(self, call: int, arguments: str, *, repaired: bool) -> None:
        """The call is complete."""
        self._deltas.append(CallEnd(call, arguments, repaired))

    def whole_call(self, name: str, arguments: str, *, repaired: bool) -> None:
        """A call all of which is known."""
        call = self.open_call(name)
        self.write_arguments(call, arguments)
        self.close_call(call, arguments, repaired=repaired)

    def close(self) -> None:
        """The grammar has ended: what was held back is text, but for space behind a call."""
        if self._space and (self._said or not self._calls):
            self._deltas.append(ContentDelta(self._space))
        self._space = ""

    def known_name(self, written: str) -> str:
        """The tool's name that a model meant, whatever its case; what it wrote where none is."""
        if written in self.tools:
            return written
        alike = [name for name in self.tools if name.casefold() == written.casefold()]
        return alike[0] if len(alike) == 1 else written

    def schema(self, name: str) -> Mapping[str, object]:
        """The schema of a tool's parameters, {} where there is no such tool."""
        return self.tools[name].parameters if name in self.tools else {}


def _blocks(text: str) -> list[str]:
    return [text[at : at + _BLOCK] for at in range(0, len(text), _BLOCK)]


@lru_cache(maxsize=64)
def any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern for the first of `texts`."""
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def overlap(text: str, markers: tuple[str, ...]) -> int:
    """How many of the last characters of `text` are the beginning of a marker."""
    longest = max(map(len, markers), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        ending = text[len(text) - size :]
        if any(marker.startswith(ending) for marker in markers):
            return size
    return 0
