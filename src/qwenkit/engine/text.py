"""Output ids to text deltas, and the decision that an output has ended.

Knows no tensor. Text is given out as soon as it is certain: whole characters, and nothing that
could still become part of a stop string.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from qwenkit.engine.guards import LoopDetector, ScriptGuard
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

    The guards of `SamplingParams` watch all of it: before a letter of a script that is not allowed
    would be given out the output ends, even within `min_tokens`; a loop ends it after them, if
    nothing else does with the same token.
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
        scripts, loops = sampling.allowed_scripts, sampling.loop_detection
        self._scripts = ScriptGuard(scripts) if scripts else None
        self._loops = LoopDetector(loops) if loops else None
        self._cut = False  # at a stop string or a forbidden letter: nothing may follow

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
        is_loop = self._loops is not None and self._loops.push(token_id)
        text, ending = self._certain(self._stream.push(token_id), may_stop=may_stop)
        if may_stop:
            complete = [pattern.push(token_id) for pattern in self._stop_sequences]
            if ending is None and any(complete):
                ending = Ending("stop", token_id)
            if ending is None and is_loop:
                ending = Ending("loop")
        if ending is None and self.tokens >= self._max_tokens:
            ending = Ending("length")
        return text, ending

    def finish(self, ending: Ending) -> tuple[str, Ending]:
        """Return the text still held back, and how the output has ended after all.

        The bytes of an unfinished character turn into text only here, so that a stop string can
        become complete even now; and what a stop string held back may have a letter in it that is
        not allowed.
        """
        if self._cut:
            return "", ending
        rest = self._stream.finish()
        text, late = self._certain(rest, may_stop=self.tokens > self._min_tokens)
        if late is None:
            held, late = self._allowed(self._stop_strings.finish())
            text += held
        is_natural = ending.reason in ("stop", "length", "loop")
        return text, late if late is not None and is_natural else ending

    def _certain(self, text: str, *, may_stop: bool) -> tuple[str, Ending | None]:
        """What of new text may be given out, and the ending that lies in it."""
        stop = None
        if may_stop:
            text, stop = self._stop_strings.push(text)
        self._cut = stop is not None
        text, ending = self._allowed(text)
        return text, Ending("stop", stop) if ending is None and stop is not None else ending

    def _allowed(self, text: str) -> tuple[str, Ending | None]:
        """Text up to the first letter of a script that is not allowed."""
        if self._scripts is None:
            return text, None
        allowed = self._scripts.allowed(text)
        if len(allowed) == len(text):
            return text, None
        self._cut = True
        return allowed, Ending("language")
