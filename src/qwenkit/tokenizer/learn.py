"""Learns the merges that make tokens of words, in the order of Qwen's `add_merges.py`.

The most frequent pair of neighbouring pieces is merged first; among equals the one with the fewest
characters, then bytes, then the first in the order of text, then the first met. Pairs are counted
once and then kept up to date, so a merge costs what it changes and not a pass over all words.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path

from qwenkit.errors import TokenizerError
from qwenkit.tokenizer.bpe import compose, split_text
from qwenkit.tokenizer.byte_pair import BytePairTokenizer
from qwenkit.tokenizer.ranks import Ranks
from qwenkit.tokenizer.reading import read_text

Pair = tuple[bytes, bytes]
_Order = tuple[int, int, int, str, bytes]


@dataclass(frozen=True, slots=True)
class Words:
    """Words (composed to NFC) and how frequent they are; `remarks` say what was passed over."""

    frequencies: Mapping[str, int]
    remarks: tuple[str, ...]


def read_words(path: Path, tokenizer: BytePairTokenizer) -> Words:
    """The words of a file, one a line with a tab and its frequency behind it, that can become
    tokens of `tokenizer`.

    Those that the split pattern cuts and those that are tokens already are left out; a repeated
    word's frequencies add up; a frequency that is no number counts as 1. Raises TokenizerError
    naming the line.
    """
    frequencies: dict[str, int] = {}
    remarks: list[str] = []
    text = read_text(path).removeprefix("\ufeff")
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip():
            continue
        word, tab, written = line.strip().partition("\t")
        if not tab or "\t" in written:
            raise TokenizerError(
                f"{path}: line {number}: expected a word, a tab and its frequency, got "
                f"{line.strip()[:60]!r}."
            )
        word = compose(word)
        if (reason := _hindrance(word, tokenizer)) is not None:
            remarks.append(f"{word!r} is left out: {reason}.")
            continue
        try:
            frequency = int(written)
        except ValueError:
            frequency = 1
            remarks.append(f"{word!r}: the frequency {written[:60]!r} is no number; 1 is taken.")
        if frequency < 1:
            raise TokenizerError(
                f"{path}: line {number}: the frequency of {word!r} is {frequency}; expected at "
                "least 1."
            )
        if word in frequencies:
            remarks.append(f"{word!r} is repeated: its frequencies are added up.")
        frequencies[word] = frequencies.get(word, 0) + frequency
    return Words(frequencies, tuple(remarks))


def _hindrance(word: str, tokenizer: BytePairTokenizer) -> str | None:
    """Why `word` cannot become a token; None if it can."""
    pieces = split_text(word, tokenizer.vocabulary.pre_tokenizer)
    if len(pieces) > 1:
        return f"text is cut into {pieces} before anything is merged"
    token_id = tokenizer.reference.regular.get(word.encode())
    if token_id is not None:
        return f"it is token {token_id} already"
    if not set(word.encode()).isdisjoint(tokenizer.reference.missing_bytes):
        return "the vocabulary lacks some of its bytes"
    return None


def learn_merges(
    words: Words,
    tokenizer: BytePairTokenizer,
    *,
    progress: Callable[[float], None] | None = None,
) -> list[Pair]:
    """The merges, best first, that make one token of each word. `progress` is told the share done,
    0 to 1.
    """
    tokens = tokenizer.vocabulary.tokens
    pieces = [
        [tokens[i] for i in tokenizer.reference.merge(word.encode())] for word in words.frequencies
    ]
    learner = _Learner(pieces, list(words.frequencies.values()))
    seams = sum(len(word) - 1 for word in pieces)
    merges = []
    for pair, gone in learner.run():
        merges.append(pair)
        if progress is not None:
            progress(gone / seams)
    return merges


def with_ids(merges: Sequence[Pair], start_id: int) -> Ranks:
    """The merged bytes → ids from `start_id` on. Where two merges make the same bytes the later id
    counts and the other stays unused.
    """
    return {left + right: start_id + i for i, (left, right) in enumerate(merges)}


class _Learner:
    """Words as pieces, how often two pieces are neighbours in them, and in which words."""

    def __init__(self, words: list[list[bytes]], frequencies: Sequence[int]) -> None:
        self._words = words
        self._frequencies = frequencies
        self._counts: defaultdict[Pair, int] = defaultdict(int)
        self._places: defaultdict[Pair, set[int]] = defaultdict(set)
        for index in range(len(words)):
            self._count(index, 1)
        # Entries are never changed: one whose count is no longer true is passed over.
        self._queue = [(_order(pair, count), pair) for pair, count in self._counts.items()]
        heapify(self._queue)

    def run(self) -> Iterator[tuple[Pair, int]]:
        """Yields each merge and how many seams between pieces are gone by then."""
        gone = 0
        while (best := self._best()) is not None:
            gone += self._merge(best)
            yield best, gone

    def _count(self, index: int, sign: int) -> set[Pair]:
        """Count the pairs of a word in (1) or out (-1), and return them."""
        pairs = set()
        for pair in pairwise(self._words[index]):
            self._counts[pair] += sign * self._frequencies[index]
            pairs.add(pair)
        for pair in pairs:
            (self._places[pair].add if sign > 0 else self._places[pair].discard)(index)
        return pairs

    def _best(self) -> Pair | None:
        """The next pair to merge; the first met of those that are equal, which make equal bytes."""
        equals: set[Pair] = set()
        order: _Order | None = None
        while self._queue and (order is None or self._queue[0][0] == order):
            entry = heappop(self._queue)
            if self._counts[entry[1]] == -entry[0][0]:
                order = entry[0]
                equals.add(entry[1])
        if order is None:
            return None
        best = min(equals, key=self._first_place) if len(equals) > 1 else equals.pop()
        for pair in equals - {best}:
            heappush(self._queue, (order, pair))
        return best

    def _first_place(self, pair: Pair) -> tuple[int, int]:
        index = min(self._places[pair])
        return index, list(pairwise(self._words[index])).index(pair)

    def _merge(self, pair: Pair) -> int:
        """Make one piece of `pair` everywhere; returns how many seams are gone."""
        changed: set[Pair] = set()
        gone = 0
        for index in list(self._places[pair]):
            changed |= self._count(index, -1)
            before = self._words[index]
            self._words[index] = _joined(before, pair)
            gone += len(before) - len(self._words[index])
            changed |= self._count(index, 1)
        for other in changed:
            if self._counts[other]:
                heappush(self._queue, (_order(other, self._counts[other]), other))
        return gone


def _order(pair: Pair, count: int) -> _Order:
    joined = pair[0] + pair[1]
    text = joined.decode("utf-8", "replace")
    return -count, len(text), len(joined), text, joined


def _joined(pieces: list[bytes], pair: Pair) -> list[bytes]:
    joined: list[bytes] = []
    both, position = list(pair), 0
    while position < len(pieces):
        found = pieces[position : position + 2] == both
        joined.append(pair[0] + pair[1] if found else pieces[position])
        position += 2 if found else 1
    return joined
