"""Output ids to text deltas, and the decision that an output has ended.

Knows no tensor. Text is given out as soon as it is certain: whole characters, and nothing that
could still become part of a stop string.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from qwenkit.types.events import FinishReason
from qwenkit.types.protocols import TokenStream
from qwenkit.types.sampling import SamplingParams

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Ending:
    """Why an output ended, and the stop string or token id that ended it."""

    reason: FinishReason
    matched_stop: str | int | None = None


class Pattern(Generic[Item]):
    """Looks for one sequence in a stream of items (Knuth, Morris and Pratt, 1977).

    `matched` is how many of the last items are the beginning of the sequence. Time is linear in
    what is pushed, whatever the sequence looks like.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.matched = 0
        self._fallback = [0] * len(items)  # by matched length - 1: the next shorter beginning
        for index in range(1, len(items)):
            length = self._fallback[index - 1]
            while length and items[length] != items[index]:
                length = self._fallback[length - 1]
            self._fallback[index] = length + (items[length] == items[index])

    def push(self, item: Item) -> bool:
        """Take one item; True when the sequence is complete with it."""
        if self.matched == len(self.items):
            self.matched = self._fallback[-1]
        while self.matched and self.items[self.matched] != item:
            self.matched = self._fallback[self.matched - 1]
        self.matched += self.items[self.matched] == item
        return self.matched == len(self.items)


class StopStrings:
    """Cuts text at the first stop string that becomes complete (of several that become complete at
    the same character, the longest). Where the text is split into pieces makes no difference.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._patterns = [(stop, Pattern(stop)) for stop in stops]
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take text; return what is certain now and the stop string found, after which nothing may
        be pushed.
        """
        text, start = self._held + text, len(self._held)
        for index in range(start, len(text)):
            found = [stop for stop, pattern in self._patterns if pattern.push(text[index])]
            if found:
                stop = max(found, key=len)
                return text[: index + 1 - len(stop)], stop
        certain = len(text) - max((p.matched for _, p in self._patterns), default=0)
        self._held = text[certain:]
        return text[:certain], None

    def finish(self) -> str:
        """Return what was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


class Output:
    """One request's output as it grows: text, and whether it has ended.

    It ends, in order of precedence, with one of `stop_ids` (mapped to what is reported; its own
    text is left out), with a stop string (left out, and all text after it), with a sequence of
    `stop_token_sequences`, or after `max_tokens` tokens. The ids of such a sequence stay in the
    output and in its text: the original (row C03) makes the token after the sequence an
    end-of-text, and this is where that output ends, without the forced token. The first
    `min_tokens` tokens do not end the output, neither do they begin a stop string or sequence.
    """

    def __init__(
        self,
        stream: TokenStream,
        sampling: SamplingParams,
        *,
        stop_ids: Mapping[int, str | int],
        max_tokens: int,
    ) -> None:
        self.tokens = 0
        self._stream = stream
        self._stop_ids = stop_ids
        self._stop_strings = StopStrings(sampling.stop)
        self._stop_sequences = [Pattern(ids) for ids in sampling.stop_token_sequences]
        self._min_tokens = sampling.min_tokens
        self._max_tokens = max_tokens
        self._cut = False  # at a stop string: nothing may follow

    @property
    def room(self) -> int:
        """How many tokens may still follow."""
        return self._max_tokens - self.tokens

    def push(self, token_id: int) -> tuple[str, Ending | None]:
        """Take one token; return the text that is certain now, and the ending if this is one."""
        self.tokens += 1
        may_stop = self.tokens > self._min_tokens
        if may_stop and token_id in self._stop_ids:
            return "", Ending("stop", self._stop_ids[token_id])
        text = self._stream.push(token_id)
        if may_stop:
            text, ending = self._cut_text(text)
            complete = [pattern.push(token_id) for pattern in self._stop_sequences]
            if ending is not None:
                return text, ending
            if any(complete):
                return text, Ending("stop", token_id)
        return text, Ending("length") if self.tokens >= self._max_tokens else None

    def finish(self, ending: Ending) -> tuple[str, Ending]:
        """Return the text still held back, and how the output has ended after all.

        The bytes of an unfinished character turn into text only here, so that a stop string can
        become complete even now.
        """
        if self._cut:
            return "", ending
        text, late = self._stream.finish(), None
        if self.tokens > self._min_tokens:
            text, late = self._cut_text(text)
        if late is not None:
            return text, late if ending.reason in ("stop", "length") else ending
        return text + self._stop_strings.finish(), ending

    def _cut_text(self, text: str) -> tuple[str, Ending | None]:
        text, stop = self._stop_strings.push(text)
        self._cut = stop is not None
        return text, None if stop is None else Ending("stop", stop)
