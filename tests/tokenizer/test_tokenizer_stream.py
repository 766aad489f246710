"""Streaming: joined deltas are the whole text, and no delta holds half a character."""

from __future__ import annotations

import random

import pytest

from qwenkit.errors import TokenizerError
from qwenkit.tokenizer import BytePairTokenizer


def _sequences(tokenizer: BytePairTokenizer, count: int) -> list[list[int]]:
    """Random ids of four kinds: any, single bytes, split characters, broken ones."""
    rng = random.Random(7)
    text = "😀 naïve 你好 👨‍👩‍👧 ไทย, \u0301 ok"
    sequences = []
    for number in range(count):
        kind = number % 4
        length = rng.randrange(1, 24)
        if kind == 0:
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(length)]
        elif kind == 1:
            ids = [rng.randrange(256) for _ in range(length)]
        else:
            data = "".join(rng.choice(text) for _ in range(length)).encode()
            ids = [tokenizer.reference.regular[bytes([b])] for b in data]
            if kind == 3:
                del ids[rng.randrange(len(ids))]
                ids.insert(rng.randrange(len(ids) + 1), rng.randrange(tokenizer.vocab_size))
        sequences.append(ids)
    return sequences


@pytest.mark.parametrize("skip_special", [False, True])
def test_joined_deltas_are_the_whole_text(qwen1: BytePairTokenizer, skip_special: bool) -> None:
    for ids in _sequences(qwen1, 5000):
        stream = qwen1.stream(skip_special=skip_special)
        deltas = [stream.push(token_id) for token_id in ids]
        deltas.append(stream.finish())
        assert "".join(deltas) == qwen1.decode(ids, skip_special=skip_special)


def test_valid_text_never_shows_a_replacement_character(qwen1: BytePairTokenizer) -> None:
    for ids in _sequences(qwen1, 2000)[2::4]:
        stream = qwen1.stream()
        assert not any("\ufffd" in stream.push(token_id) for token_id in ids)
        assert stream.finish() == ""


def test_special_tokens_are_skipped_and_others_shown(qwen2: BytePairTokenizer) -> None:
    ids = qwen2.encode("<|im_start|>a<tool_call>b<|im_end|>", allowed_special="all")
    assert ids == [151644, 64, 151646, 65, 151645]
    for skip_special, text in ((True, "a<tool_call>b"), (False, qwen2.decode(ids))):
        stream = qwen2.stream(skip_special=skip_special)
        assert "".join(map(stream.push, ids)) + stream.finish() == text


def test_a_finished_stream_starts_anew(qwen1: BytePairTokenizer) -> None:
    stream = qwen1.stream()
    stream.push(51461)
    assert stream.finish() == "\ufffd"
    assert stream.push(117) == "\ufffd"
    assert stream.finish() == ""


def test_an_id_outside_the_vocabulary_is_refused(qwen1: BytePairTokenizer) -> None:
    with pytest.raises(TokenizerError, match="token id 151851 is not in the vocabulary"):
        qwen1.stream().push(151851)
