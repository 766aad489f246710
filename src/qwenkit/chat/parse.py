"""A reply's text, as it comes, to what it is made of: text, thoughts and calls of tools.

A dialect's grammar (`dialects/`) is a generator that takes the text from a `Tape` and writes deltas
to it; it stops where it needs more text. It never looks at where a piece of text begins or ends, so
that the deltas, joined, do not depend on it. Time is linear in the text. Nothing is lost: what
turns out to be no call is text, to the letter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from qwenkit.chat.grammar import may_think
from qwenkit.chat.json_repair import repair_arguments, repair_object
from qwenkit.chat.json_scan import JsonScan
from qwenkit.chat.tape import Steps, Tape, any_of, overlap
from qwenkit.types.completion import Reply, ReplyCall
from qwenkit.types.deltas import (
    CallArguments,
    CallEnd,
    CallStart,
    ContentDelta,
    ReasoningDelta,
    ReplyDelta,
)

Grammar = Callable[[Tape], Steps[None]]

THINK, THINK_END = "<think>", "</think>"


class ReplyParser:
    """Pushes a reply's text through a grammar; see the module's docstring."""

    def __init__(self, grammar: Grammar, tape: Tape) -> None:
        self._tape = tape
        self._steps = grammar(tape)
        self._open = True

    def push(self, text: str) -> tuple[ReplyDelta, ...]:
        """More of the reply has come; what is certain of it now."""
        self._tape.add(text)
        return self._run()

    def end(self, *, complete: bool = True) -> tuple[ReplyDelta, ...]:
        """The reply has ended; what was held back. Not `complete` is one that was cut off, by
        max_tokens or a stop string of the user's: an open call is then not mended.
        """
        self._tape.finish(complete=complete)
        return self._run()

    def _run(self) -> tuple[ReplyDelta, ...]:
        if self._open:
            try:
                next(self._steps)
            except StopIteration:
                self._open = False
                self._tape.close()
        return self._tape.take_deltas()


class ReplyCollector:
    """Deltas as one `Reply`."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._names: list[str] = []
        self._written: list[list[str]] = []
        self._ends: dict[int, CallEnd] = {}

    def add(self, deltas: Sequence[ReplyDelta]) -> None:
        """Take the next deltas."""
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                self._content.append(delta.text)
            elif isinstance(delta, ReasoningDelta):
                self._reasoning.append(delta.text)
            elif isinstance(delta, CallStart):
                self._names.append(delta.name)
                self._written.append([])
            elif isinstance(delta, CallArguments):
                self._written[delta.index].append(delta.text)
            else:
                self._ends[delta.index] = delta

    def reply(self) -> Reply:
        """All of it so far."""
        return Reply(
            content="".join(self._content),
            reasoning="".join(self._reasoning) or None,
            tool_calls=tuple(
                ReplyCall(
                    name=name,
                    arguments="".join(self._written[i]),
                    repaired=i in self._ends and self._ends[i].repaired,
                    complete=i in self._ends,
                )
                for i, name in enumerate(self._names)
            ),
        )


def plain(tape: Tape) -> Steps[None]:
    """The grammar of a reply that is text and nothing else."""
    yield from tape.until((), tape.say)


def thoughts(tape: Tape) -> Steps[None]:
    """A thought between <think> and </think> at the reply's beginning, if there is one."""
    if not may_think(tape.start):
        return
    at = tape.start.rfind(THINK)
    if at < 0:
        space = yield from tape.skip(_SPACES)
        if not (yield from tape.expect(THINK)):
            tape.put_back(space)
            return
    if at < 0 or not tape.start[at + len(THINK) :].strip("\n"):
        yield from tape.skip(_LINE_BREAKS)
    held: list[str] = []

    def give(text: str) -> None:
        kept = text.rstrip("\n")
        if kept:
            tape.think("".join(held) + kept)
            held.clear()
        if len(kept) < len(text):
            held.append(text[len(kept) :])

    ended = yield from tape.until((THINK_END,), give)
    if ended is not None:
        yield from tape.skip(_LINE_BREAKS)


def read_arguments(tape: Tape, name: str, ends: tuple[str, ...]) -> Steps[str | None]:
    """A call's arguments, which end with their object or in front of one of `ends`.

    Returns None, or, where no call can be made of them, the text that was taken. An object is given
    out as it comes, anything else once all of it is there.
    """
    space = yield from tape.skip(_SPACES)
    if (yield from tape.expect("{")):
        tape.put_back("{")
        yield from _stream_object(tape, name, ends)
        return None
    keep = overlap(space, ends)  # it may be the beginning of an end
    tape.put_back(space[len(space) - keep :])
    space = space[: len(space) - keep]
    taken: list[str] = []
    end = yield from tape.until(ends, taken.append)
    tape.put_back(end or "")
    written = "".join(taken)
    cut_off = end is None and tape.cut_off
    is_known = name in tape.tools and not cut_off
    arguments = repair_arguments(written, tape.schema(name)) if is_known else None
    if arguments is None:
        return space + written
    tape.whole_call(name, arguments, repaired=arguments != written.strip())
    return None


def _stream_object(tape: Tape, name: str, ends: tuple[str, ...]) -> Steps[None]:
    """An object of arguments, the brace first. Where it is no strict JSON any more, or one of
    `ends` stands in a text that never ends, nothing more is given out until all of it is there.
    """
    call = tape.open_call(name)
    scan, window = JsonScan(), ""
    raw: list[str] = []
    unsent: list[str] = []  # its end
    sent = 0
    cut: int | None = None  # where the first of `ends` stands in a text
    while not (scan.complete or scan.broken):
        chunk = yield from tape.chunk()
        if chunk is None:
            break
        used = scan.feed(chunk)
        tape.put_back(chunk[used:])
        raw.append(chunk[:used])
        unsent.append(chunk[:used])
        if cut is None:
            window += chunk[:used]
            found = any_of(ends).search(window)
            keep = overlap(window, ends)
            if found is not None:
                cut = scan.length - len(window) + found.start()
            certain = min(scan.certain, scan.length - keep if cut is None else cut)
            window = window[len(window) - keep :]
            if certain > sent:
                text = "".join(unsent)
                tape.write_arguments(call, text[: certain - sent])
                unsent, sent = [text[certain - sent :]], certain
    if scan.complete:
        tape.write_arguments(call, "".join(unsent))
        tape.close_call(call, "".join(raw), repaired=False)
        return
    if cut is not None:
        text = "".join(raw)
        tape.put_back(text[cut:])
        source, end = text[:cut], text[cut:]
    else:
        text = "".join(raw)
        tape.put_back(window)  # it may be the beginning of an end
        raw = [text[: len(text) - len(window)]]
        end = (yield from tape.until(ends, raw.append)) or ""
        tape.put_back(end)
        source = "".join(raw)
    repaired = None
    if end or not tape.cut_off:
        repaired = repair_object(source, tape.schema(name))
    if repaired is None or not repaired.text.startswith(source[:sent]):
        tape.write_arguments(call, source[sent:])  # what was given out is never taken back
        return
    tape.write_arguments(call, repaired.text[sent:])
    tape.close_call(call, repaired.text, repaired=repaired.text != source[: repaired.used])
    tape.put_back(source[repaired.used :])


_SPACES = re.compile(r"\s*")
_LINE_BREAKS = re.compile(r"\n*")
