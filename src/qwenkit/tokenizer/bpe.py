"""Byte-level byte-pair encoding in plain Python: the reference that the fast path must equal.

Text is cut into pieces by a split pattern, a piece is spelt as bytes, and neighbouring tokens are
merged, best rank first and leftmost among equals, until no merge applies (Sennrich et al., arXiv
1508.07909; bytes as in GPT-2). A piece of n bytes takes O(n log n), so that this is also the
fallback for vocabularies that the fast path cannot be shown to serve. Nothing here knows files,
models or chats.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import heapify, heappop, heappush
from typing import Any, Literal

import regex

Normalization = Literal["none", "text", "segments"]
Merge = tuple[int, int, int]
PairRule = Callable[[int, int], tuple[int, int] | None]

_CACHED_PIECES = 1 << 16
_LONG_MARK_RUN = regex.compile(r"\p{M}{64,}")


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut into pieces that no merge crosses.

    `stages` are applied one after the other; each cuts every piece into its matches and what lies
    between them. `single` is one pattern with the same effect, None where there is none.
    """

    name: str
    stages: tuple[str, ...]
    single: str | None


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# A digit ends the stretch of text that the second stage sees, so white space before a digit is cut
# as at the end of the text: the look-ahead may not object to digits.
_SMOLLM = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "qwen2": PreTokenizer("qwen2", (_QWEN2,), _QWEN2),
    "gpt-2": PreTokenizer("gpt-2", (_GPT2,), _GPT2),
    "smollm": PreTokenizer("smollm", (r"\p{N}", _GPT2), _SMOLLM),
    "llama-bpe": PreTokenizer("llama-bpe", (_LLAMA3,), _LLAMA3),
    "default": PreTokenizer("default", _DEFAULT, None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Everything a byte-level BPE tokenizer is, whatever file it came from.

    `tokens[id]` are the bytes of an id (a control token's name in UTF-8; empty for an unused id).
    `control` maps the text of every token that plain text must not become to its id; those that
    decoding may skip are in `special_ids`. `merges` are (left id, right id, result id), best first;
    None means that ids are ranks and any two neighbours whose joined bytes are a token may merge.
    `normalization` composes text to NFC ("text": before control tokens are looked for, as the first
    generation does; "segments": after, as Qwen2 does). `whole_piece_first`: a piece that is itself
    a token is that token, reachable by merges or not.
    """

    tokens: tuple[bytes, ...] = field(repr=False)
    control: Mapping[str, int] = field(repr=False)
    special_ids: frozenset[int] = field(repr=False)
    unused_ids: frozenset[int] = field(repr=False, default=frozenset())
    merges: tuple[Merge, ...] | None = field(repr=False)
    pre_tokenizer: PreTokenizer
    normalization: Normalization
    whole_piece_first: bool

    def regular_ids(self) -> dict[bytes, int]:
        """Bytes → id of every token that is neither control nor unused, in the order of ids."""
        skip = self.unused_ids.union(self.control.values())
        return {token: i for i, token in enumerate(self.tokens) if i not in skip}


def _printable_bytes() -> str:
    """GPT-2's alphabet: the character that stands for each byte value, printable ones as they are
    in Latin-1, the others from U+0100 on.
    """
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(b if b in kept else next(others)) for b in range(256))


BYTE_ALPHABET = _printable_bytes()
# The stub of codecs types the encoding table as opaque; charmap_encode takes it as it is.
_ALPHABET_TABLE: Any = codecs.charmap_build(BYTE_ALPHABET)


def bytes_from_alphabet(text: str) -> bytes:
    """The bytes that a token written in GPT-2's alphabet stands for.

    Raises UnicodeEncodeError when a character is not in the alphabet.
    """
    return codecs.charmap_encode(text, "strict", _ALPHABET_TABLE)[0]


def bytes_to_alphabet(token: bytes) -> str:
    """A token's bytes written in GPT-2's alphabet."""
    return codecs.charmap_decode(token, "strict", BYTE_ALPHABET)[0]


def compose(text: str) -> str:
    """Text in Unicode normalization form C, in linear time.

    The standard library sorts combining marks by insertion, which is quadratic on a long run of
    them, so long runs are sorted here first; that changes nothing in the result.
    """
    if text.isascii():
        return text
    # A line feed composes with nothing, and most lines are composed already, which is soon seen.
    return "\n".join([_compose_line(line) for line in text.split("\n")])


def _compose_line(line: str) -> str:
    if line.isascii():
        return line
    return unicodedata.normalize("NFC", _LONG_MARK_RUN.sub(_sort_marks, line))


def _sort_marks(run: Any) -> str:
    marks = "".join(unicodedata.normalize("NFD", mark) for mark in run.group())
    segment, keyed = 0, []
    for mark in marks:
        order = unicodedata.combining(mark)
        segment += order == 0  # marks of class 0 stay where they are and nothing moves across them
        keyed.append((segment, order))
    return "".join(marks[i] for i in sorted(range(len(marks)), key=keyed.__getitem__))


def split_text(text: str, pre_tokenizer: PreTokenizer) -> list[str]:
    """The pieces of `text`, in order; joined they are `text` again."""
    pieces = [text]
    for pattern in _compiled(pre_tokenizer.stages):
        pieces = [part for piece in pieces for part in _cut(pattern, piece)]
    return pieces


@lru_cache(maxsize=64)
def _compiled(patterns: tuple[str, ...]) -> list[Any]:
    return [regex.compile(pattern) for pattern in patterns]


def _cut(pattern: Any, text: str) -> Iterator[str]:
    position = 0
    for match in pattern.finditer(text):
        start, end = match.span()
        if start > position:
            yield text[position:start]
        if end > start:
            yield text[start:end]
        position = end
    if position < len(text):
        yield text[position:]


def merge_symbols(symbols: Sequence[int], rule: PairRule, *, below: int | None = None) -> list[int]:
    """Merge neighbouring ids while `rule` names a merge; O(n log n).

    `rule(left, right)` gives (rank, result id) or None. The lowest rank goes first, the leftmost of
    equals. `below` stops before the first merge of that rank or a higher one.
    """
    ids = list(symbols)
    count = len(ids)
    following = list(range(1, count + 1))
    previous = list(range(-1, count - 1))
    queue: list[tuple[int, int, int, int, int]] = []

    def candidate(position: int) -> tuple[int, int, int, int, int] | None:
        left, right = ids[position], ids[following[position]]
        found = rule(left, right)
        return None if found is None else (found[0], position, left, right, found[1])

    for position in range(count - 1):
        if (entry := candidate(position)) is not None:
            queue.append(entry)
    heapify(queue)
    while queue:
        rank, position, left, right, result = heappop(queue)
        if below is not None and rank >= below:
            break
        after = following[position]
        # An entry is stale when an earlier merge took one of its two tokens.
        if ids[position] != left or after >= count or ids[after] != right:
            continue
        ids[position], ids[after] = result, -1
        following[position] = following[after]
        if following[after] < count:
            previous[following[after]] = position
            if (entry := candidate(position)) is not None:
                heappush(queue, entry)
        if previous[position] >= 0 and (entry := candidate(previous[position])) is not None:
            heappush(queue, entry)
    return [token_id for token_id in ids if token_id >= 0]


class ReferenceEncoder:
    """Plain text to ids, exactly as the vocabulary says and in no other way."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.regular = vocabulary.regular_ids()
        self._bytes_to_ids = [self.regular.get(bytes([b])) for b in range(256)]
        self.missing_bytes = bytes(b for b in range(256) if self._bytes_to_ids[b] is None)
        self._rule: PairRule | None = None
        self._cache: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of normalised text; nothing in it is read as a control token."""
        ids: list[int] = []
        for piece in split_text(text, self.vocabulary.pre_tokenizer):
            ids += self.encode_piece(piece)
        return ids

    def encode_piece(self, piece: str) -> tuple[int, ...]:
        """Ids of one piece of the pre-split."""
        found = self._cache.get(piece)
        if found is None:
            if len(self._cache) >= _CACHED_PIECES:
                self._cache.clear()
            found = self._cache[piece] = tuple(self._encode_bytes(piece.encode()))
        return found

    def _encode_bytes(self, piece: bytes) -> list[int]:
        # A byte that the vocabulary cannot spell is dropped, as the originals do.
        piece = piece.translate(None, self.missing_bytes)
        if self.vocabulary.whole_piece_first and (whole := self.regular.get(piece)) is not None:
            return [whole]
        return self.merge(piece)

    def merge(self, piece: bytes, *, below: int | None = None) -> list[int]:
        """Ids of a piece's bytes by merges alone; `below` leaves merges of that rank and higher
        undone. Every byte must be in the vocabulary.
        """
        symbols = [i for b in piece if (i := self._bytes_to_ids[b]) is not None]
        if self._rule is None:  # costly for a large vocabulary, and the fast path rarely asks
            listed = self.vocabulary.merges is not None
            self._rule = self._listed_rule() if listed else self._joined_rule()
        return merge_symbols(symbols, self._rule, below=below)

    def _listed_rule(self) -> PairRule:
        merges = self.vocabulary.merges or ()
        pairs = {(left, right): (rank, i) for rank, (left, right, i) in enumerate(merges)}
        return lambda left, right: pairs.get((left, right))

    def _joined_rule(self) -> PairRule:
        tokens, regular = self.vocabulary.tokens, self.regular

        def rule(left: int, right: int) -> tuple[int, int] | None:
            joined = regular.get(tokens[left] + tokens[right])
            return None if joined is None else (joined, joined)

        return rule
