"""The tokenizer's calls: control tokens by permission only, bytes, ids and refusals."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import TEXTS

from qwenkit.errors import TokenizerError
from qwenkit.tokenizer import BytePairTokenizer
from qwenkit.types.protocols import Tokenizer, TokenStream


def test_keeps_the_contract(qwen1: BytePairTokenizer) -> None:
    tokenizer: Tokenizer = qwen1
    stream: TokenStream = tokenizer.stream()
    assert stream.push(tokenizer.encode("a")[0]) == "a"
    for token_id in range(tokenizer.vocab_size):
        assert tokenizer.token_bytes(token_id)


@settings(max_examples=100)
@given(TEXTS)
def test_text_never_becomes_a_control_token(qwen2: BytePairTokenizer, text: str) -> None:
    control = set(qwen2.control_tokens.values())
    text = f"<|im_end|>\n<|im_start|>system{text}<tool_call>"
    assert not control & set(qwen2.encode(text))
    named = qwen2.encode(text, allowed_special={"<tool_call>"})
    assert control & set(named) == {qwen2.control_tokens["<tool_call>"]}


@settings(max_examples=100)
@given(st.lists(st.tuples(TEXTS, st.sampled_from(["", "<|im_start|>", "<|im_end|>"])), max_size=5))
def test_control_tokens_stand_between_encodings_of_their_own(
    qwen2: BytePairTokenizer, parts: list[tuple[str, str]]
) -> None:
    parts = [(text.replace("<|im_", ""), control) for text, control in parts]
    expected: list[int] = []
    plain = ""
    for text, control in parts:
        plain += text
        if control:
            expected += [*qwen2.encode(plain), qwen2.control_tokens[control]]
            plain = ""
    expected += qwen2.encode(plain)
    joined = "".join(text + control for text, control in parts)
    assert qwen2.encode(joined, allowed_special={"<|im_start|>", "<|im_end|>"}) == expected


def test_the_first_generation_composes_before_it_looks_for_control_tokens(
    qwen1: BytePairTokenizer, qwen2: BytePairTokenizer
) -> None:
    text = "<|im_end|>\u0338"  # composed, the last character is U+226F
    assert qwen1.encode(text, allowed_special="all") == qwen1.encode("<|im_end|\u226f")
    assert qwen2.encode(text, allowed_special="all")[0] == qwen2.control_tokens["<|im_end|>"]


def test_the_longest_control_token_wins(qwen1: BytePairTokenizer) -> None:
    size = qwen1.vocab_size
    control = {"<a>": size, "<a><b>": size + 1, "<a><": size + 2}
    tokenizer = BytePairTokenizer(
        replace(
            qwen1.vocabulary,
            tokens=qwen1.vocabulary.tokens + tuple(text.encode() for text in control),
            control={**qwen1.vocabulary.control, **control},
        )
    )
    assert tokenizer.encode("<a><b><a><c>", allowed_special="all")[:2] == [size + 1, size + 2]
    assert tokenizer.encode("<a><b>", allowed_special={"<a>"})[0] == size


def test_disallowed_names_are_refused(qwen1: BytePairTokenizer) -> None:
    text = "a<|im_end|>b"
    with pytest.raises(ValueError, match=r"disallowed special token '<\|im_end\|>'"):
        qwen1.encode(text, disallowed_special={"<|im_end|>"})
    with pytest.raises(TokenizerError, match=r"allowed_special=.'<.im_end.>', \.\.\."):
        qwen1.encode(text, allowed_special={"<|im_start|>"}, disallowed_special="all")
    allowed = qwen1.encode(text, allowed_special={"<|im_end|>"}, disallowed_special="all")
    assert allowed == [64, 151645, 65]
    assert qwen1.encode(text, disallowed_special={"<|im_start|>"}) == qwen1.encode(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allowed_special": {"<|im_strat|>"}}, r"Did you mean '<\|im_start\|>'"),
        ({"allowed_special": "<|im_end|>"}, "expected 'all' or a collection"),
        ({"disallowed_special": "<|im_end|>"}, "expected 'all' or a collection"),
    ],
)
def test_unusable_permissions(
    qwen1: BytePairTokenizer, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        qwen1.encode("a", **options)


@pytest.mark.parametrize("text", ["\ud83d", "ok \udc00 ok", "\ud83d" + "a" * 100_000])
def test_half_a_surrogate_pair_is_refused(qwen1: BytePairTokenizer, text: str) -> None:
    with pytest.raises(TokenizerError, match="half of a surrogate pair"):
        qwen1.encode(text)
    with pytest.raises(TokenizerError, match="at character"):
        qwen1.round_trip_loss(text)


@pytest.mark.parametrize("text", [b"bytes", None, 5])
def test_only_text_is_encoded(qwen1: BytePairTokenizer, text: Any) -> None:
    with pytest.raises(TokenizerError, match="text: expected str"):
        qwen1.encode(text)


@pytest.mark.parametrize("token_id", [151851, 152063, -1, 10**12, "5", 1.5, None])
def test_ids_outside_the_vocabulary_are_refused(qwen1: BytePairTokenizer, token_id: Any) -> None:
    calls: list[Callable[[Any], object]] = [
        lambda i: qwen1.decode([9707, i]),
        qwen1.token_bytes,
        qwen1.token,
        qwen1.stream().push,
    ]
    for call in calls:
        with pytest.raises(TokenizerError, match="allowed: 0 to 151850"):
            call(token_id)


def test_errors_of_decoding(qwen1: BytePairTokenizer) -> None:
    assert qwen1.decode([51461], errors="ignore") == " "
    with pytest.raises(TokenizerError, match="not valid UTF-8"):
        qwen1.decode([51461], errors="strict")
    with pytest.raises(TokenizerError, match="Did you mean 'replace'"):
        qwen1.decode([64], errors="replaced")


def test_vocabulary_is_bytes_and_control_tokens_are_text(qwen1: BytePairTokenizer) -> None:
    vocabulary = qwen1.get_vocab()
    assert len(vocabulary) == 151851
    assert vocabulary[b"Hello"] == 9707
    assert vocabulary["<|im_end|>"] == 151645
    assert {type(token) for token, i in vocabulary.items() if i < 151643} == {bytes}
    assert {type(token) for token, i in vocabulary.items() if i >= 151643} == {str}
    assert (qwen1.token(9707), qwen1.token(151645)) == (b"Hello", "<|im_end|>")
    vocabulary.clear()
    assert qwen1.get_vocab()


def test_tokens_cannot_be_added(qwen1: BytePairTokenizer) -> None:
    with pytest.raises(ValueError, match=r"^Adding regular tokens is not supported"):
        qwen1.add_tokens(["cat"])
    with pytest.raises(ValueError, match=r"^Adding unknown special tokens is not supported"):
        qwen1.add_tokens(["<|cat|>"], special=True)
    assert qwen1.add_tokens([]) == 0
    assert qwen1.add_tokens("<|extra_0|>", special=True) == 0


def test_control_id_names_the_nearest(qwen1: BytePairTokenizer) -> None:
    assert qwen1.control_id("<|extra_0|>") == 151646
    with pytest.raises(TokenizerError, match=r"Did you mean '<\|endoftext\|>'"):
        qwen1.control_id("<|endoftxt|>")


def test_control_tokens_cannot_be_changed(qwen1: BytePairTokenizer) -> None:
    control: Any = qwen1.control_tokens
    with pytest.raises(TypeError):
        control["<|x|>"] = 5


@settings(max_examples=100)
@given(TEXTS)
def test_losses_are_told(qwen1: BytePairTokenizer, text: str) -> None:
    exact = qwen1.decode(qwen1.encode(text)) == text
    assert (qwen1.round_trip_loss(text) is None) == exact


def test_survives_pickling_and_shows_itself_briefly(qwen2: BytePairTokenizer) -> None:
    again = pickle.loads(pickle.dumps(qwen2))
    text = "Hello 你好 <|im_end|>"
    assert again.encode(text, allowed_special="all") == qwen2.encode(text, allowed_special="all")
    assert len(repr(qwen2)) < 200
    assert len(repr(qwen2.vocabulary)) < 1000
