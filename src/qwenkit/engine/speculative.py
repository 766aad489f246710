"""Guessing the next tokens, so that one step checks several: speculative decoding (arXiv
2211.17192), here by looking up what followed the same tokens before.

A guess never changes the output: the step samples from the row before each guessed token as it
would have without, with the random number of that place in the output, and a guess stands only if
it is the token that was sampled. Knows no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

_MOST_DRAFTED = 15  # with the sampled one a step of sixteen tokens
_SIZES = (4, 3, 2)  # of the endings that are looked for, the longest first
_ROW_SHARE = 0.17  # of the time of a step of one token, that each further one adds
_PRIOR = 0.7  # share of the guesses that stand, before any was made
_MEMORY = 0.8  # that earlier guesses keep of their weight when there are new ones
_FADING = 0.98  # and when there are none, so that guessing is tried again now and then


class Drafter(Protocol):
    """Guesses for decoding sequences."""

    def propose(
        self, sequences: Iterable[tuple[str, Sequence[int]]], room: Mapping[str, int]
    ) -> dict[str, tuple[int, ...]]:
        """What sequences, by request, may go on with: at most `room` tokens each, often none."""
        ...

    def observe(self, request_id: str, drafted: int, accepted: int) -> None:
        """Take note of how many guesses were computed and how many of them stood."""
        ...

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        ...


class DraftLength:
    """How many guesses are worth their time, learnt from how many stood.

    If each stands with probability p, the k-th one is of use with p^k, and costs the time of one
    row: it is worth it while p^k is more than that row's share of what a token costs now. Where
    several sequences decode together a token is cheap, so guessing pays only if it is nearly sure.
    """

    def __init__(self, guess_cost: float = 0.0) -> None:
        """`guess_cost` is the time that making one guess takes, in steps of one token."""
        self._guess_cost = guess_cost
        self._stood = self._tried = 0.0

    def best(self, decoding: int) -> int:
        """How many to guess while `decoding` sequences decode in the same step."""
        cost = (_ROW_SHARE + self._guess_cost) * decoding / (1 + _ROW_SHARE * (decoding - 1))
        chance = (self._stood + _PRIOR) / (self._tried + 1)
        if chance <= cost:
            self._stood *= _FADING
            self._tried *= _FADING
            return 0
        return min(_MOST_DRAFTED, int(math.log(cost) / math.log(min(chance, 0.99))))

    def observe(self, drafted: int, accepted: int) -> None:
        """Count guesses: those behind the first wrong one say nothing."""
        self._stood = _MEMORY * self._stood + accepted
        self._tried = _MEMORY * self._tried + min(accepted + 1, drafted)


class PromptLookup:
    """Guesses that a sequence goes on as it did the last time that it ended in the same tokens."""

    def __init__(self) -> None:
        self._sequences: dict[str, _Endings] = {}

    def propose(
        self, sequences: Iterable[tuple[str, Sequence[int]]], room: Mapping[str, int]
    ) -> dict[str, tuple[int, ...]]:
        """See `Drafter.propose`."""
        sequences = list(sequences)
        drafts = {}
        for name, tokens in sequences:
            endings = self._sequences.setdefault(name, _Endings())
            start = endings.find(tokens)
            if start is None:
                continue
            count = min(endings.length.best(len(sequences)), room[name])
            if count > 0:
                drafts[name] = tuple(tokens[start : start + count])
        return drafts

    def observe(self, request_id: str, drafted: int, accepted: int) -> None:
        """See `Drafter.observe`."""
        self._sequences[request_id].length.observe(drafted, accepted)

    def forget(self, request_id: str) -> None:
        """See `Drafter.forget`."""
        self._sequences.pop(request_id, None)


class _Endings:
    """Where each run of tokens of one growing sequence ended last; every token is read once."""

    def __init__(self) -> None:
        self.length = DraftLength()
        self._places: dict[tuple[int, ...], int] = {}
        self._read = 0

    def find(self, tokens: Sequence[int]) -> int | None:
        """The place behind the last earlier occurrence of the longest ending that has one."""
        for stop in range(max(self._read, min(_SIZES)), len(tokens)):
            for size in _SIZES:
                if size <= stop:
                    self._places[tuple(tokens[stop - size : stop])] = stop
        self._read = len(tokens)
        for size in _SIZES:
            place = self._places.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if place is not None:
                return place
        return None
