"""The fast path on tiktoken, used only for vocabularies it is shown to serve exactly.

tiktoken merges whatever neighbours join to a token, by the token's rank; a merge list allows only
the pairs it names. The two agree on every text if each token, spelt on its own, comes about by its
own merge: whatever two neighbours stand between two boundaries that no merge has crossed evolved as
they would have alone, so they join to a token only if they are the pair that its merge names.
`proven_ranks` checks that once, when a vocabulary is loaded.

tiktoken's regular expression overflows on a million spaces and its large pieces outgrow the
processor's caches, so text is handed over in stretches cut where a piece ends in any case. What
cannot be cut is split here, and a long piece is encoded in slices whose seams are then checked.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

import tiktoken

from qwenkit.tokenizer.bpe import Merge, ReferenceEncoder, split_text

_STRETCH_CHARS = 4096
_LONGEST_STRETCH_CHARS = 16384
_SEARCHED_CHARS = 1 << 16  # in one go
# A letter or number before white space or a mark of punctuation ends a piece under every split
# pattern: no pattern has an alternative in which a letter or number is followed by anything else
# than letters or numbers.
_PIECE_END = re.compile(r"[^\W_](?=[ \n.,;:!?，。、；：！？])")

Ranks = dict[bytes, int]


def proven_ranks(reference: ReferenceEncoder) -> Ranks | None:
    """Token bytes → rank for tiktoken, or None where it is not shown that its merges are the same
    as those of `reference`.

    The ranks are ids when ids rise with the merges; otherwise positions in the list of merges after
    256 ranks for bytes.
    """
    vocabulary, regular = reference.vocabulary, reference.regular
    if vocabulary.pre_tokenizer.single is None:
        return None
    if vocabulary.merges is None:
        return regular
    tokens, merges = vocabulary.tokens, vocabulary.merges
    if not _each_token_has_its_merge(tokens, merges):
        return None
    singles = {token: i for token, i in regular.items() if len(token) == 1}
    if vocabulary.whole_piece_first and len(regular) != len(singles) + len(merges):
        return None
    results = [result for _, _, result in merges]
    if all(map(int.__lt__, results, results[1:])):
        return singles | {tokens[result]: result for result in results}
    return {token: rank for rank, token in enumerate(singles)} | {
        tokens[result]: 256 + rank for rank, result in enumerate(results)
    }


def _each_token_has_its_merge(tokens: tuple[bytes, ...], merges: tuple[Merge, ...]) -> bool:
    """Whether every merge makes a token of its own from parts that exist by then, and no other
    merge would cross the seam between its parts while they are being made.
    """
    lefts, rights, ranks = [-1] * len(tokens), [-1] * len(tokens), [-1] * len(tokens)
    # A pair is one number, left * size + right: 150,000 tuples would cost tenths of a second.
    pair_ranks: dict[int, int] = {}
    size = len(tokens)
    for rank, (left, right, result) in enumerate(merges):
        if (
            (ranks[left] < 0 and len(tokens[left]) != 1)
            or (ranks[right] < 0 and len(tokens[right]) != 1)
            or ranks[result] >= 0
        ):
            return False
        lefts[result], rights[result], ranks[result] = left, right, rank
        pair_ranks[left * size + right] = rank
    find = pair_ranks.get
    for merge_rank, (left, right, _) in enumerate(merges):
        # Walk back in time along the two edges of the seam. `left` exists until `left_end`, `right`
        # until `right_end`; a merge of the two within that time would have crossed. At the very
        # rank at which `left` is swallowed it is swallowed first, since equals go left to right.
        left_end = right_end = merge_rank
        left_rank, right_rank = ranks[left], ranks[right]
        while left_rank != right_rank or left_rank >= 0:
            if left_rank > right_rank:
                left_end, left = left_rank, rights[left]
                left_rank = ranks[left]
            else:
                right_end, right = right_rank, lefts[right]
                right_rank = ranks[right]
            crossing = find(left * size + right)
            if crossing is not None and crossing < left_end and crossing <= right_end:
                return False
    return True


class FastEncoder:
    """Plain text to ids through tiktoken; equal to `reference` on every text, linear in its length.

    `ranks` must come from `proven_ranks` for the same vocabulary.
    """

    def __init__(self, reference: ReferenceEncoder, ranks: Ranks) -> None:
        vocabulary = reference.vocabulary
        self._reference = reference
        self._pre_tokenizer = vocabulary.pre_tokenizer
        self._ranks = ranks
        self._tiktoken = _encoding(ranks, vocabulary.pre_tokenizer.single or "")
        self._whole_piece: tiktoken.Encoding | None = None
        regular = reference.regular
        self._ids: dict[int, int] | None = None
        if not ranks.items() <= regular.items():
            self._ids = {rank: regular[token] for token, rank in ranks.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of normalised text; nothing in it is read as a control token."""
        ids: list[int] = []
        for start, end in _stretches(text):
            stretch = text[start:end]
            if end - start <= _LONGEST_STRETCH_CHARS and not self._is_doubtful(stretch):
                ids += self._translate(self._tiktoken.encode_ordinary(stretch))
            else:
                ids += self._encode_pieces(stretch)
        return ids

    def _is_doubtful(self, text: str) -> bool:
        """Whether `text` has a character that tiktoken may class otherwise than the reference,
        because it is newer than this Python's Unicode tables, or a byte without a token.
        """
        if not text.isascii() and "Cn" in map(unicodedata.category, set(text)):
            return True
        return _has_any(text, self._reference.missing_bytes)

    def _encode_pieces(self, text: str) -> list[int]:
        ids: list[int] = []
        seen: dict[str, list[int]] = {}
        for piece in split_text(text, self._pre_tokenizer):
            found = seen.get(piece)
            if found is None:
                found = seen[piece] = self._encode_piece(piece)
            ids += found
        return ids

    def _encode_piece(self, piece: str) -> list[int]:
        if _has_any(piece, self._reference.missing_bytes):
            return list(self._reference.encode_piece(piece))
        if self._whole_piece is None:
            self._whole_piece = _encoding(self._ranks, r"(?s:.+)")
        whole = self._whole_piece
        ids: list[int] = []
        for start in range(0, len(piece), _STRETCH_CHARS):
            part = self._translate(whole.encode_ordinary(piece[start : start + _STRETCH_CHARS]))
            self._append(ids, part)
        return ids

    def _translate(self, ranks: list[int]) -> list[int]:
        return ranks if self._ids is None else [self._ids[rank] for rank in ranks]

    def _append(self, ids: list[int], right: list[int]) -> None:
        """Append to `ids`, the encoding of a stretch of bytes, that of the bytes after it.

        A sequence of tokens is the encoding of its bytes if every two neighbours are the encoding
        of theirs, so tokens around the seam are encoded again until both new seams hold.
        """
        tokens = self._reference.vocabulary.tokens
        if not ids or self._seam_holds(ids[-1], right[0]):
            ids += right
            return
        before = after = 1
        while True:
            again = ids[len(ids) - before :] + right[:after]
            middle = self._reference.merge(b"".join(tokens[i] for i in again))
            left_holds = before == len(ids) or self._seam_holds(ids[-before - 1], middle[0])
            right_holds = after == len(right) or self._seam_holds(middle[-1], right[after])
            if left_holds and right_holds:
                break
            before = before if left_holds else min(2 * before, len(ids))
            after = after if right_holds else min(2 * after, len(right))
        ids[len(ids) - before :] = middle
        ids += right[after:]

    def _seam_holds(self, left: int, right: int) -> bool:
        tokens = self._reference.vocabulary.tokens
        return self._reference.merge(tokens[left] + tokens[right]) == [left, right]


def _encoding(ranks: Ranks, pattern: str) -> tiktoken.Encoding:
    return tiktoken.Encoding("qwenkit", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def _has_any(text: str, values: bytes) -> bool:
    return bool(values) and not set(text.encode()).isdisjoint(values)


def _stretches(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of stretches of about `_STRETCH_CHARS` that end where a piece ends; one is
    longer where no certain end of a piece is near.
    """
    start, count = 0, len(text)
    while start < count:
        end = _piece_end(text, start + _STRETCH_CHARS)
        yield start, end
        start = end


def _piece_end(text: str, start: int) -> int:
    """Where the next certain end of a piece is; the text's end where there is none. Other threads
    get their turns meanwhile: a million letters are a search of 60 ms.
    """
    for first in range(start, len(text), _SEARCHED_CHARS):
        match = _PIECE_END.search(text, first, first + _SEARCHED_CHARS + 1)
        if match:
            return match.end()
    return len(text)
