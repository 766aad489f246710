"""The readable reference: alphabet, splitting, merging, composing."""

from __future__ import annotations

import itertools
import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_texts import TEXTS

from qwenkit.tokenizer.bpe import (
    BYTE_ALPHABET,
    PRE_TOKENIZERS,
    bytes_from_alphabet,
    bytes_to_alphabet,
    compose,
    merge_symbols,
    split_text,
)


def test_alphabet_is_one_printable_character_a_byte() -> None:
    assert len(set(BYTE_ALPHABET)) == 256
    assert BYTE_ALPHABET[ord(" ")] == "Ġ"
    assert BYTE_ALPHABET[ord("\n")] == "Ċ"
    assert BYTE_ALPHABET[ord("a")] == "a"
    assert all(c.isprintable() and not c.isspace() for c in BYTE_ALPHABET)


@given(st.binary())
def test_alphabet_round_trip(token: bytes) -> None:
    assert bytes_from_alphabet(bytes_to_alphabet(token)) == token


def test_alphabet_refuses_other_characters() -> None:
    with pytest.raises(UnicodeEncodeError):
        bytes_from_alphabet("a b")


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@given(text=TEXTS)
def test_pieces_join_to_the_text(name: str, text: str) -> None:
    pieces = split_text(text, PRE_TOKENIZERS[name])
    assert "".join(pieces) == text
    assert all(pieces)


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("qwen2", ["Don", "'t", " ", "1", "2", "?!", "  ", " x"]),
        ("gpt-2", ["Don", "'t", " 12", "?!", "  ", " x"]),
        ("smollm", ["Don", "'t", " ", "1", "2", "?!", "  ", " x"]),
        ("llama-bpe", ["Don", "'t", " ", "12", "?!", "  ", " x"]),
    ],
)
def test_split_patterns_differ_where_they_should(name: str, pieces: list[str]) -> None:
    assert split_text("Don't 12?!   x", PRE_TOKENIZERS[name]) == pieces


def _naive_merge(symbols: list[int], merges: dict[tuple[int, int], tuple[int, int]]) -> list[int]:
    ids = list(symbols)
    while True:
        found = [
            (merges[pair][0], i) for i, pair in enumerate(itertools.pairwise(ids)) if pair in merges
        ]
        if not found:
            return ids
        _, i = min(found)
        ids[i : i + 2] = [merges[ids[i], ids[i + 1]][1]]


@given(st.integers(0, 2**32), st.lists(st.integers(0, 2), max_size=30))
def test_merging_equals_repeated_search_for_the_best_pair(seed: int, symbols: list[int]) -> None:
    rng = random.Random(seed)
    merges: dict[tuple[int, int], tuple[int, int]] = {}
    known = [0, 1, 2]
    for rank in range(rng.randrange(12)):
        pair = (rng.choice(known), rng.choice(known))
        if pair not in merges:
            merges[pair] = (rank, len(known))
            known.append(len(known))
    ranks = list(range(len(merges)))
    rng.shuffle(ranks)  # a merge may rank before the merges that make its parts
    merges = {pair: (rank, merges[pair][1]) for pair, rank in zip(merges, ranks, strict=True)}
    result = merge_symbols(symbols, lambda left, right: merges.get((left, right)))
    assert result == _naive_merge(symbols, merges)


def test_merging_stops_below_a_rank() -> None:
    merges = {(0, 1): (0, 2), (2, 2): (1, 3)}

    def rule(left: int, right: int) -> tuple[int, int] | None:
        return merges.get((left, right))

    assert merge_symbols([0, 1, 0, 1], rule) == [3]
    assert merge_symbols([0, 1, 0, 1], rule, below=1) == [2, 2]


@pytest.mark.parametrize("unit", [[0], [0, 1], [0, 0, 1]])
def test_merging_asks_for_a_number_of_pairs_linear_in_the_length(unit: list[int]) -> None:
    merges = {(0, 0): (0, 2), (2, 2): (1, 3), (3, 3): (2, 4), (0, 1): (3, 5), (2, 1): (4, 6)}
    asked = 0

    def rule(left: int, right: int) -> tuple[int, int] | None:
        nonlocal asked
        asked += 1
        return merges.get((left, right))

    symbols = (unit * 30_000)[:30_000]
    merge_symbols(symbols, rule)
    assert asked <= 3 * len(symbols)


_MARKS = st.sampled_from("\u0301\u0316\u0308\u0327\u0338\u0345\u0f73\u0344\u05b0\u3099\u1161\u11a8")
_BASES = st.sampled_from("aeϒ>ﬁ각ᄀ\u0f40\u09c7")


@given(st.lists(st.one_of(_BASES, _MARKS, _MARKS, st.lists(_MARKS, min_size=64, max_size=90))))
def test_composing_is_nfc(parts: list[str | list[str]]) -> None:
    text = "".join(part if isinstance(part, str) else "".join(part) for part in parts)
    assert compose(text) == unicodedata.normalize("NFC", text)


@given(TEXTS)
def test_composing_is_nfc_on_any_text(text: str) -> None:
    assert compose(text) == unicodedata.normalize("NFC", text)


def test_composing_a_long_run_of_marks_does_not_hang() -> None:
    text = "a" + "\u0301\u0316" * 200_000  # sorted by insertion this takes many minutes
    composed = compose(text)
    assert composed == "á" + "\u0316" * 200_000 + "\u0301" * 199_999
