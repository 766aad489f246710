"""The fast path equals the reference, and is used only where that is shown."""

from __future__ import annotations

import itertools
import random
import unicodedata
from collections import Counter
from dataclasses import replace

import pytest
import regex
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_texts import TEXTS

from qwenkit.tokenizer import BytePairTokenizer, fast
from qwenkit.tokenizer.bpe import (
    PRE_TOKENIZERS,
    Merge,
    Normalization,
    ReferenceEncoder,
    Vocabulary,
    split_text,
)
from qwenkit.tokenizer.fast import FastEncoder, proven_ranks


def _vocabulary(
    tokens: list[bytes],
    merges: list[Merge],
    *,
    kind: str = "gpt-2",
    normalization: Normalization = "none",
    whole_piece_first: bool = False,
) -> Vocabulary:
    return Vocabulary(
        tokens=tuple(tokens),
        control={},
        special_ids=frozenset(),
        merges=tuple(merges),
        pre_tokenizer=PRE_TOKENIZERS[kind],
        normalization=normalization,
        whole_piece_first=whole_piece_first,
    )


def _named(singles: str, *merges: str) -> Vocabulary:
    """A vocabulary of single-byte tokens and merges such as "ab c", in that order."""
    pairs = [merge.encode().split() for merge in merges]
    tokens = [c.encode() for c in singles]
    tokens += dict.fromkeys(left + right for left, right in pairs)
    index = tokens.index
    return _vocabulary(tokens, [(index(a), index(b), index(a + b)) for a, b in pairs])


def _trained(seed: int, *, merges: int, alphabet: bytes = b"ab") -> Vocabulary:
    """Merges learnt from random text, most frequent pair first: what published files hold."""
    rng = random.Random(seed)
    words = [[rng.randrange(len(alphabet)) for _ in range(rng.randrange(2, 14))] for _ in range(30)]
    tokens = [bytes([b]) for b in alphabet]
    listed: list[Merge] = []
    for _ in range(merges):
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        fresh = [p for p in pairs if tokens[p[0]] + tokens[p[1]] not in tokens]
        if not fresh:
            break
        left, right = max(fresh, key=lambda p: (pairs[p], p))
        tokens.append(tokens[left] + tokens[right])
        listed.append((left, right, len(tokens) - 1))
        for word in words:
            for i in range(len(word)):  # from the left, as merges are applied
                if word[i : i + 2] == [left, right]:
                    word[i : i + 2] = [len(tokens) - 1]
    return _vocabulary(tokens, listed)


@settings(max_examples=250)
@given(TEXTS)
@example("   5 \u00a0x")
@example("'ſ 'ſt I'ſ")
def test_equals_the_reference_and_tiktoken(
    qwen1: BytePairTokenizer, tiktoken_itself: tiktoken.Encoding, text: str
) -> None:
    assert qwen1.backend == "tiktoken"
    normalised = unicodedata.normalize("NFC", text)
    ids = qwen1.encode(text)
    assert ids == qwen1.reference.encode(normalised)
    assert ids == tiktoken_itself.encode_ordinary(normalised)
    assert qwen1.decode(ids) == normalised


@settings(max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@example("\U0001fae8 new emoji, \U00010ee0 new letters \U000323b0\U00011bd0")
def test_equals_the_reference_beyond_this_pythons_unicode(
    qwen1: BytePairTokenizer, text: str
) -> None:
    normalised = unicodedata.normalize("NFC", text)
    assert qwen1.encode(text) == qwen1.reference.encode(normalised)


@settings(max_examples=100)
@given(TEXTS)
def test_listed_merges_give_the_same_as_ranks(
    qwen1: BytePairTokenizer, qwen2: BytePairTokenizer, text: str
) -> None:
    assert qwen2.backend == "tiktoken"
    assert qwen2.encode(text) == qwen1.encode(text)
    assert qwen2.reference.encode(text) == qwen1.reference.encode(text)


@pytest.fixture(scope="module")
def tiktoken_itself(qwen1: BytePairTokenizer) -> tiktoken.Encoding:
    """tiktoken on whole texts, as the original uses it."""
    return tiktoken.Encoding(
        "original",
        pat_str=qwen1.vocabulary.pre_tokenizer.single or "",
        mergeable_ranks=qwen1.vocabulary.regular_ids(),
        special_tokens={},
    )


@pytest.mark.parametrize("name", [n for n, p in PRE_TOKENIZERS.items() if p.single])
@settings(max_examples=120)
@given(text=TEXTS)
@example(text="a   1  b \n 2\n\n3 \t4")
def test_single_pattern_splits_as_the_stages_do(name: str, text: str) -> None:
    known = PRE_TOKENIZERS[name]
    assert regex.findall(known.single, text) == split_text(text, known)


@pytest.mark.parametrize("expression", [r"\p{L}", r"\p{N}", r"\s", "(?i:s)", "(?i:[tremvld])"])
def test_character_classes_agree_on_everything_assigned(expression: str) -> None:
    bytes_only = {bytes([b]): b for b in range(256)}
    selector = tiktoken.Encoding(
        "class", pat_str=expression, mergeable_ranks=bytes_only, special_tokens={}
    )
    assigned = "".join(
        chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")
    )
    theirs = bytes(selector.encode_ordinary(assigned)).decode()
    assert theirs == "".join(regex.findall(expression, assigned))


def test_certain_ends_of_pieces_follow_letters_and_numbers() -> None:
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    before = {c for c in every if fast._PIECE_END.match(c + " ")}
    assert {"a", "é", "你", "5", "½"} <= before
    assert all(regex.fullmatch(r"[\p{L}\p{N}]", c) for c in before)


@pytest.mark.parametrize("kind", [n for n, p in PRE_TOKENIZERS.items() if p.single])
@settings(max_examples=120)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_stretches_end_where_pieces_end(kind: str, texts: list[str]) -> None:
    text = "".join(texts)
    ends, position = set(), 0
    for piece in split_text(text, PRE_TOKENIZERS[kind]):
        position += len(piece)
        ends.add(position)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "_STRETCH_CHARS", 2)
        stretches = list(fast._stretches(text))
    assert [s for s, _ in stretches[1:]] == [e for _, e in stretches[:-1]]
    assert {e for _, e in stretches} <= ends
    assert "".join(text[s:e] for s, e in stretches) == text


@given(st.text("ab1_ \n.，中"), st.integers(1, 9))
def test_the_end_of_a_piece_is_found_in_any_number_of_goes(text: str, goes: int) -> None:
    for start in range(len(text)):
        match = fast._PIECE_END.search(text, start)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fast, "_SEARCHED_CHARS", goes)
            assert fast._piece_end(text, start) == (match.end() if match else len(text))


@settings(max_examples=100)
@given(TEXTS)
def test_small_stretches_and_slices_change_nothing(qwen1: BytePairTokenizer, text: str) -> None:
    text = unicodedata.normalize("NFC", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "_STRETCH_CHARS", 3)
        patch.setattr(fast, "_LONGEST_STRETCH_CHARS", 5)
        ids = qwen1.encode(text)
    assert ids == qwen1.reference.encode(text)


@settings(max_examples=120)
@given(st.integers(0, 300), st.text("ab", max_size=60), st.integers(1, 9))
def test_slices_of_a_long_piece_are_joined_exactly(seed: int, text: str, length: int) -> None:
    reference = ReferenceEncoder(_trained(seed, merges=12))
    ranks = proven_ranks(reference)
    assert ranks is not None
    encoder = FastEncoder(reference, ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "_STRETCH_CHARS", length)
        patch.setattr(fast, "_LONGEST_STRETCH_CHARS", length)
        assert encoder.encode(text) == reference.encode(text)


def test_trained_merges_are_shown_equivalent() -> None:
    for seed in range(60):
        vocabulary = _trained(seed, merges=20, alphabet=b"abc")
        reference = ReferenceEncoder(vocabulary)
        ranks = proven_ranks(reference)
        assert ranks is not None
        encoder, rng = FastEncoder(reference, ranks), random.Random(seed)
        for _ in range(40):
            text = "".join(rng.choice("abc") for _ in range(rng.randrange(40)))
            assert encoder.encode(text) == reference.encode(text)


def test_what_is_not_shown_is_left_to_the_reference() -> None:
    shown = 0
    for seed in range(400):
        rng = random.Random(seed)
        tokens, listed = [b"a", b"b"], []
        for _ in range(8):
            left, right = rng.randrange(len(tokens)), rng.randrange(len(tokens))
            joined = tokens[left] + tokens[right]
            if joined not in tokens:
                tokens.append(joined)
                listed.append((left, right, len(tokens) - 1))
        tokenizer = BytePairTokenizer(_vocabulary(tokens, listed))
        joined_rule = replace(tokenizer.vocabulary, merges=None)
        by_ranks = ReferenceEncoder(joined_rule)
        texts = ["".join(rng.choice("ab") for _ in range(rng.randrange(24))) for _ in range(40)]
        same = all(tokenizer.reference.encode(t) == by_ranks.encode(t) for t in texts)
        assert [tokenizer.encode(t) for t in texts] == [
            tokenizer.reference.encode(t) for t in texts
        ]
        if tokenizer.backend == "tiktoken":
            assert same
            shown += 1
    assert 20 < shown < 380


@pytest.mark.parametrize(
    ("vocabulary", "why"),
    [
        (_named("abc", "a b", "b c", "a bc"), "abc is spelt ab, c, so that its merge never runs"),
        (_named("abc", "b c", "ab c", "a b"), "a merge before the one that makes its part"),
        (_named("abc", "a b", "b c", "ab c", "a bc"), "two merges for one token"),
        (_named("a", "a a", "a aa"), "aaa is spelt aa, a from the left"),
    ],
)
def test_merges_that_tiktoken_would_get_wrong(vocabulary: Vocabulary, why: str) -> None:
    assert proven_ranks(ReferenceEncoder(vocabulary)) is None, why
    assert BytePairTokenizer(vocabulary).backend == "reference"


def test_tokens_without_merges_are_kept_from_tiktoken() -> None:
    vocabulary = _named("abc", "a b")
    vocabulary = replace(vocabulary, tokens=(*vocabulary.tokens, b"abc", b"bc"))
    tokenizer = BytePairTokenizer(vocabulary)
    assert tokenizer.backend == "tiktoken"
    assert tokenizer.encode("abc") == tokenizer.reference.encode("abc") == [3, 2]
    whole = BytePairTokenizer(replace(vocabulary, whole_piece_first=True))
    assert whole.backend == "reference"
    assert whole.encode("abc") == [4]
    assert whole.encode("abcc") == [3, 2, 2]


def test_ids_need_not_be_ranks() -> None:
    for seed in range(20):
        plain = _trained(seed, merges=15)
        rng = random.Random(seed)
        order = list(range(len(plain.tokens)))
        rng.shuffle(order)
        tokens = [plain.tokens[order.index(i)] for i in range(len(order))]
        merges = tuple((order[a], order[b], order[c]) for a, b, c in plain.merges or ())
        tokenizer = BytePairTokenizer(replace(plain, tokens=tuple(tokens), merges=merges))
        assert tokenizer.backend == "tiktoken"
        for _ in range(20):
            text = "".join(rng.choice("ab") for _ in range(30))
            assert tokenizer.encode(text) == tokenizer.reference.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["ab", "a", "b", " ", "é", "x", "\x04", "😀"]), max_size=20))
def test_bytes_without_a_token_are_dropped(parts: list[str]) -> None:
    tokenizer = BytePairTokenizer(_named("ab ", "a b"))
    text = "".join(parts)
    kept = "".join(c for c in text if c in "ab ")
    assert tokenizer.encode(text) == tokenizer.reference.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == kept
    assert (tokenizer.round_trip_loss(text) is None) == (kept == text)


SHAPES = {
    "a": "a",
    "Chinese": "天",
    "spaces": " ",
    "newlines": "\n",
    "digits": "7",
    "emoji": "😁",
    "combining marks": "e\u0316\u0301\u0316",
    "marks alone": "\u0301\u0316",
    "space newline": " \n",
    "prose": "The quick brown fox, jumps over 12 dogs.\n",
}


@pytest.mark.parametrize("shape", [*SHAPES, "random letters"])
def test_a_million_characters_of_anything(qwen1: BytePairTokenizer, shape: str) -> None:
    rng = random.Random(0)
    count = 1_000_000
    unit = SHAPES.get(shape)
    text = (unit * count)[:count] if unit else "".join(rng.choices("abcdefghij", k=count))
    assert qwen1.decode(qwen1.encode(text)) == qwen1_normal_form(text)


def qwen1_normal_form(text: str) -> str:
    """NFC, without the standard library's quadratic sorting of long runs of marks."""
    if "\u0301\u0316" * 50 in text:
        half = text.count("\u0316")
        return "\u0316" * half + "\u0301" * (len(text) - half)
    return unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("shape", SHAPES)
def test_long_runs_equal_the_reference(qwen1: BytePairTokenizer, shape: str) -> None:
    text = qwen1_normal_form((SHAPES[shape] * 20_000)[:20_000])
    assert qwen1.encode(f"Well, {text} x") == qwen1.reference.encode(
        unicodedata.normalize("NFC", f"Well, {text} x")
    )
