"""New tokens: the published example byte for byte, every way of loading them, what is refused."""

from __future__ import annotations

import base64
import json
import logging
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import corpus

from qwenkit.errors import TokenizerError
from qwenkit.tokenizer import (
    BytePairTokenizer,
    from_folder,
    from_gguf,
    from_path,
    from_tiktoken,
    to_gguf_metadata,
    write_folder,
)
from qwenkit.tokenizer.bpe import ReferenceEncoder, compose
from qwenkit.tokenizer.extend import extended
from qwenkit.tokenizer.learn import Pair, Words, learn_merges, read_words, with_ids
from qwenkit.tokenizer.ranks import read_extra_ranks, write_ranks

# The example of Qwen's tokenization_note_zh.md: the words, and the file that they give.
WORDS = "我是一只猫\t20\n你是一只猫\t10\n他是一只猫\t5\n一只\t200\n一只猫\t100\n夸张的 比喻手法\t20"
LEARNT = (
    b"5LiA5Y+q54yr 151851\n5Y+q54yr 151852\n5piv5LiA5Y+q54yr 151853\n"
    b"5oiR5piv5LiA5Y+q54yr 151854\n5L2g5piv5LiA5Y+q54yr 151855\n5LuW5piv5LiA5Y+q54yr 151856\n"
)


@pytest.fixture
def extra_path(tmp_path: Path) -> Path:
    path = tmp_path / "qwen_extra.tiktoken"
    path.write_bytes(LEARNT)
    return path


def _words(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bytes_only(tmp_path_factory: pytest.TempPathFactory) -> BytePairTokenizer:
    """The 256 bytes and the first generation's control tokens: 464 ids."""
    path = tmp_path_factory.mktemp("bytes") / "qwen.tiktoken"
    write_ranks(path, {bytes([b]): b for b in range(256)})
    return from_tiktoken(path)


def test_the_published_example_byte_for_byte(qwen1: BytePairTokenizer, tmp_path: Path) -> None:
    words = read_words(_words(tmp_path, WORDS), qwen1)
    assert words.remarks == (
        "'一只' is left out: it is token 102292 already.",
        "'夸张的 比喻手法' is left out: text is cut into ['夸张的', ' 比喻手法'] before anything "
        "is merged.",
    )
    shares: list[float] = []
    merges = learn_merges(words, qwen1, progress=shares.append)
    write_ranks(tmp_path / "out.tiktoken", with_ids(merges, 151851))
    assert (tmp_path / "out.tiktoken").read_bytes() == LEARNT
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_every_way_of_loading_them(
    qwen1: BytePairTokenizer, qwen_tiktoken_path: Path, extra_path: Path, tmp_path: Path
) -> None:
    appended = tmp_path / "both" / "qwen.tiktoken"
    appended.parent.mkdir()
    appended.write_bytes(qwen_tiktoken_path.read_bytes() + LEARNT)
    named = tmp_path / "named"
    named.mkdir()
    (named / "qwen.tiktoken").symlink_to(qwen_tiktoken_path)
    (named / "extra.tiktoken").write_bytes(LEARNT)
    (named / "tokenizer_config.json").write_text('{"extra_vocab_file": "extra.tiktoken"}')
    by_argument = from_tiktoken(qwen_tiktoken_path, extra_vocab_file=extra_path)
    write_folder(by_argument, tmp_path / "hf")
    ways = {
        "argument": by_argument,
        "appended": from_path(appended),
        "named in the folder": from_folder(named),
        "appended and given too": from_tiktoken(appended, extra_vocab_file=extra_path),
        "vocab.json and merges.txt": from_folder(tmp_path / "hf"),
        "tokenizer.json alone": from_path(tmp_path / "hf" / "tokenizer.json"),
    }
    texts = [*corpus(60), "我是一只猫，他也是一只猫。只猫是一只", "小猫是一只猫"]
    for way, tokenizer in ways.items():
        assert len(tokenizer) == 151857, way
        assert tokenizer.encode("我是一只猫") == [151854], way
        assert tokenizer.control_tokens == qwen1.control_tokens, way
        assert tokenizer.backend == "tiktoken"
        for text in texts:
            ids = tokenizer.encode(text, allowed_special="all")
            assert ids == by_argument.encode(text, allowed_special="all"), (way, text)
            if max(ids) < 151851:
                assert ids == qwen1.encode(text, allowed_special="all"), (way, text)


def test_a_vocabulary_with_listed_merges(qwen2: BytePairTokenizer, extra_path: Path) -> None:
    ranks = read_extra_ranks(extra_path)
    tokenizer = from_gguf(to_gguf_metadata(qwen2), extra_vocab_file=extra_path)
    assert tokenizer.vocabulary.merges is not None
    assert len(tokenizer.vocabulary.merges) == 151643 - 256 + 6
    assert tokenizer.encode("我是一只猫") == [151854]
    assert len(tokenizer.vocabulary.unused_ids) == 151851 - len(qwen2)
    dense = extended(
        qwen2.vocabulary, {t: i - 151851 + 151648 for t, i in ranks.items()}, source=""
    )
    assert BytePairTokenizer(dense).encode("我是一只猫") == [151651]
    assert dense.unused_ids == frozenset()


def _recounted(pieces: dict[tuple[bytes, ...], int]) -> list[Pair]:
    """The same rule with all pairs counted anew for every merge."""
    merges = []
    while True:
        counts: Counter[Pair] = Counter()
        for word, frequency in pieces.items():
            for pair in pairwise(word):
                counts[pair] += frequency
        if not counts:
            return merges

        def key(pair: Pair, counts: Counter[Pair] = counts) -> tuple[int, int, int, str, bytes]:
            both = b"".join(pair)
            text = both.decode("utf-8", "replace")
            return -counts[pair], len(text), len(both), text, both

        best = min(counts, key=key)
        merges.append(best)
        merged = {}
        for word, frequency in pieces.items():
            left: list[bytes] = []
            for piece in word:
                if left and (left[-1], piece) == best:
                    left[-1] = (
                        b"\0" + left[-1] + piece
                    )  # marked: not the left part of another merge
                else:
                    left.append(piece)
            merged[tuple(p.removeprefix(b"\0") for p in left)] = frequency
        pieces = merged


@settings(max_examples=60)
@given(
    frequencies=st.dictionaries(
        st.text("abé一只猫是", min_size=1, max_size=9), st.integers(1, 6), min_size=1, max_size=20
    )
)
def test_kept_counts_are_recounted_ones(
    bytes_only: BytePairTokenizer, frequencies: dict[str, int]
) -> None:
    merges = learn_merges(Words(frequencies, ()), bytes_only)
    spelt = {tuple(bytes([b]) for b in w.encode()): n for w, n in frequencies.items()}
    assert merges == _recounted(spelt)
    if merges:
        grown = extended(bytes_only.vocabulary, with_ids(merges, 464), source="")
        encoder = ReferenceEncoder(replace(grown, whole_piece_first=False))
        assert {len(encoder.encode(compose(word))) for word in frequencies} == {1}


def test_written_with_merges_it_is_the_same(bytes_only: BytePairTokenizer, tmp_path: Path) -> None:
    listed = ["一只猫", "只猫是", "猫是一", "hello", "hell", "Zebra", "你好", "ello"]
    words = Words({word: n for n, word in enumerate(listed, 1)}, ())
    extra = with_ids(learn_merges(words, bytes_only), 464)
    grown = BytePairTokenizer(extended(bytes_only.vocabulary, extra, source=""))
    write_folder(grown, tmp_path)
    written = from_folder(tmp_path)
    assert written.vocabulary.merges is not None
    for text in [*corpus(200), "一只猫是一只猫是一hellohello Zebra"]:
        assert written.encode(text) == grown.encode(text), text


def test_a_token_made_twice_has_the_later_id() -> None:
    merges = [(b"a", b"bc"), (b"x", b"y"), (b"ab", b"c")]
    assert with_ids(merges, 300) == {b"abc": 302, b"xy": 301}


def test_words_are_read_as_the_original_reads_them(
    qwen1: BytePairTokenizer, tmp_path: Path
) -> None:
    text = "\ufeffqwenkit\t3\r\n\r\n  cafe\u0301s\u2028\t many \nqwenkit\t4\n"
    words = read_words(_words(tmp_path, text.replace("\u2028", "")), qwen1)
    assert words.frequencies == {"qwenkit": 7, "cafés": 1}
    assert words.remarks == (
        "'cafés': the frequency ' many' is no number; 1 is taken.",
        "'qwenkit' is repeated: its frequencies are added up.",
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("word", "line 2: expected a word, a tab and its frequency, got 'word'"),
        ("a\tb\t3", "line 2: expected a word, a tab"),
        ("qwenkits\t0", "line 2: the frequency of 'qwenkits' is 0; expected at least 1"),
    ],
)
def test_unusable_lines(qwen1: BytePairTokenizer, tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        read_words(_words(tmp_path, f"qwenkit\t1\n{line}\n"), qwen1)


@pytest.mark.parametrize(
    ("token_id", "message"),
    [
        (151645, r"control token '<\|im_end\|>'.*from id 151851 on"),
        (151642, "is below 151643"),
        (99999999, "too high for a vocabulary of 151851 ids"),
    ],
)
def test_ids_that_cannot_be(
    qwen1: BytePairTokenizer, tmp_path: Path, token_id: int, message: str
) -> None:
    path = tmp_path / "extra.tiktoken"
    path.write_bytes(base64.b64encode("只猫".encode()) + b" %d\n" % token_id)
    with pytest.raises(TokenizerError, match=message) as raised:
        extended(qwen1.vocabulary, read_extra_ranks(path), source=str(path))
    assert str(path) in str(raised.value)


def test_a_token_that_is_there_already_stays(
    qwen1: BytePairTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert extended(qwen1.vocabulary, {b"Hello": 151851}, source="x") is qwen1.vocabulary
    assert "b'Hello' is token 9707 already" in caplog.text


def test_a_token_without_a_merge_is_refused(qwen2: BytePairTokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"comes about by no merge \(4 parts are left\)"):
        extended(qwen2.vocabulary, {"我是一只猫".encode(): 151700}, source="x")


@pytest.mark.parametrize("name", ["../extra.tiktoken", "/etc/x", 3])
def test_only_a_file_of_the_same_folder_is_read(
    qwen_tiktoken_path: Path, tmp_path: Path, name: object
) -> None:
    (tmp_path / "qwen.tiktoken").symlink_to(qwen_tiktoken_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_vocab_file": name}))
    with pytest.raises(TokenizerError, match="expected the name of a file in the same folder"):
        from_folder(tmp_path)


def test_other_files_are_no_vocabularies(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(TokenizerError, match="no vocabulary file"):
        from_path(tmp_path / "vocab.txt")
