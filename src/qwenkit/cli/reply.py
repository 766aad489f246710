"""One answer while it is made: its text, its speed, how it ended, and its way to the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

from qwenkit.cli import console
from qwenkit.types.events import Event, FinishEvent, FinishReason, PromptEvent

_ENDS: dict[FinishReason, str] = {
    "length": "cut at the token limit",
    "language": "ended before a letter of a script that is not allowed",
    "loop": "ended in a loop",
    "timeout": "out of time",
    "abort": "stopped",
}


class Reply:
    """One answer while it is made.

    `text` is what came so far (after what a continued answer already had), `notices` what the
    reader should know before it, `finish` the engine's last event, None when it was stopped.
    """

    def __init__(
        self,
        question: str,
        events: Iterator[Event],
        *,
        continued: str = "",
        notices: tuple[str, ...] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.question = question
        self.notices = notices
        self.text = continued
        self.finish: FinishEvent | None = None
        self.token_count = 0
        self.first_token_s = 0.0
        self._events = events
        self._clock = clock
        self._decode_s = 0.0

    @property
    def ended(self) -> FinishReason:
        """How it ended; "abort" until it has."""
        return "abort" if self.finish is None else self.finish.reason

    def pieces(self) -> Generator[str, None, None]:
        """The text as it comes, whole characters only.

        A KeyboardInterrupt while it waits for the engine (which has a thread of its own, so that
        nothing is left half done) ends it early and leaves `ended` "abort".
        """
        started_s = self._clock()
        try:
            for event in self._events:
                if isinstance(event, PromptEvent):
                    continue
                now_s = self._clock() - started_s
                if isinstance(event, FinishEvent):
                    self.finish = event
                else:
                    self.token_count += 1
                    self.first_token_s = self.first_token_s or now_s
                    self._decode_s = now_s - self.first_token_s
                self.text += event.text
                if event.text:
                    yield event.text
        except KeyboardInterrupt:
            return
        finally:
            close = getattr(self._events, "close", None)
            if close is not None:
                close()  # aborts the request unless it has finished

    @property
    def tokens_per_second(self) -> float | None:
        """The speed after the first token; None for less than two tokens."""
        if self.token_count < 2 or self._decode_s <= 0:
            return None
        return (self.token_count - 1) / self._decode_s

    def summary(self) -> str:
        """The closing line: tokens, speed, time to the first token, and how it ended if oddly."""
        speed = self.tokens_per_second
        parts = [f"{self.token_count} token{'' if self.token_count == 1 else 's'}"]
        if speed is not None:
            parts.append(f"{speed:.1f} tokens/s")
        if self.token_count:
            parts.append(f"first token after {self.first_token_s:.2f} s")
        if self.ended in _ENDS:
            parts.append(_ENDS[self.ended])
        return " · ".join(parts)


def show_reply(reply: Reply, *, label: str = "") -> None:
    """Write a reply as it comes, then its closing line; Ctrl-C ends it early."""
    for notice in reply.notices:
        console.note(notice)
    console.say(label, end="")
    try:
        with closing(reply.pieces()) as pieces:
            for piece in pieces:
                console.say(piece, end="")
    except KeyboardInterrupt:
        pass  # it came while a piece was written, not while one was awaited
    if not reply.text.endswith("\n"):
        console.say("")
    console.note(f"[{reply.summary()}]")
