"""One format in, any out: the same ids from every file written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizer_texts import corpus

from qwenkit.errors import TokenizerError
from qwenkit.tokenizer import (
    BytePairTokenizer,
    from_folder,
    from_gguf,
    from_tiktoken,
    to_gguf_metadata,
    to_tokenizer_config,
    to_tokenizer_json,
    write_folder,
    write_tiktoken,
)
from qwenkit.tokenizer.bpe import BYTE_ALPHABET, PRE_TOKENIZERS, bytes_from_alphabet
from qwenkit.tokenizer.export import listed_merges

TEXTS = corpus(150)


def _same(tokenizer: BytePairTokenizer, original: BytePairTokenizer) -> None:
    assert tokenizer.vocab_size == original.vocab_size
    assert tokenizer.control_tokens == original.control_tokens
    assert tokenizer.special_ids == original.special_ids
    assert tokenizer.get_vocab() == original.get_vocab()
    assert listed_merges(tokenizer) == listed_merges(original)
    for text in TEXTS:
        assert tokenizer.encode(text) == original.encode(text)
        allowed = tokenizer.encode(text, allowed_special="all")
        assert allowed == original.encode(text, allowed_special="all")


@pytest.fixture(scope="module")
def folder(qwen2: BytePairTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen2")
    (path / "tokenizer_config.json").write_text('{"chat_template": "kept", "add_prefix_space": 1}')
    names = [file.name for file in write_folder(qwen2, path)]
    assert names == ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"]
    return path


def test_tokenizer_json(folder: Path, qwen2: BytePairTokenizer) -> None:
    _same(from_folder(folder), qwen2)


def test_vocab_and_merges(folder: Path, qwen2: BytePairTokenizer, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(folder / name)
    _same(from_folder(tmp_path), qwen2)
    lines = (folder / "merges.txt").read_text("utf-8").splitlines()
    assert lines[:4] == ["#version: 0.2", "Ġ Ġ", "ĠĠ ĠĠ", "i n"]
    assert len(lines) == 151388


def test_other_keys_of_the_configuration_stay(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert config["chat_template"] == "kept"
    assert config["add_prefix_space"] is False
    assert config["tokenizer_class"] == "Qwen2Tokenizer"
    assert config["added_tokens_decoder"]["151646"]["content"] == "<tool_call>"
    assert config["added_tokens_decoder"]["151646"]["special"] is False


def test_gguf_metadata_padded_to_the_rows_of_the_model(qwen2: BytePairTokenizer) -> None:
    metadata = to_gguf_metadata(qwen2, vocab_rows=151936)
    assert len(metadata["tokenizer.ggml.tokens"]) == 151936
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD151935]"
    assert metadata["tokenizer.ggml.token_type"][151643:151650] == [3, 3, 3, 4, 4, 5, 5]
    _same(from_gguf(metadata), qwen2)
    with pytest.raises(TokenizerError, match="vocab_rows: got 5"):
        to_gguf_metadata(qwen2, vocab_rows=5)


def test_first_generation_file_byte_for_byte(
    folder: Path, qwen_tiktoken_path: Path, qwen1: BytePairTokenizer, tmp_path: Path
) -> None:
    for tokenizer in (qwen1, from_folder(folder)):
        write_tiktoken(tokenizer, tmp_path / "qwen.tiktoken")
        written = (tmp_path / "qwen.tiktoken").read_bytes()
        assert written == qwen_tiktoken_path.read_bytes()
    assert from_tiktoken(tmp_path / "qwen.tiktoken").encode("你好") == [108386]


def _small(pre_tokenizer: str) -> BytePairTokenizer:
    """Control tokens first, ids of bytes last and out of order: nothing is where Qwen has it."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer,
        "tokenizer.ggml.tokens": ["<|end|>", "<|x|>", "ab", "Ġab", *reversed(BYTE_ALPHABET[32:])],
        "tokenizer.ggml.token_type": [3, 4] + [1] * 226,
        "tokenizer.ggml.merges": ["a b", "Ġ ab"],
    }
    return from_gguf(metadata)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_kind_of_vocabulary(name: str, tmp_path: Path) -> None:
    original = _small(name)
    _same(from_gguf(to_gguf_metadata(original)), original)
    if name == "default":
        with pytest.raises(TokenizerError, match="cannot express the split pattern 'default'"):
            write_folder(original, tmp_path)
        return
    write_folder(original, tmp_path)
    _same(from_folder(tmp_path), original)
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    assert content["model"]["vocab"]["<|end|>"] == 0  # readers would number it otherwise
    assert to_tokenizer_config(original)["added_tokens_decoder"]["1"]["special"] is False


def test_gguf_says_only_what_its_names_say() -> None:
    original = _small("gpt-2")
    composed = BytePairTokenizer(replace(original.vocabulary, normalization="segments"))
    with pytest.raises(TokenizerError, match="normalization 'segments'"):
        to_gguf_metadata(composed)
    assert to_tokenizer_json(composed)["normalizer"] == {"type": "NFC"}


def test_ids_that_are_no_ranks_cannot_be_a_tiktoken_file(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="not merge ranks from 0 on"):
        write_tiktoken(_small("gpt-2"), tmp_path / "x.tiktoken")


def test_a_token_that_no_merge_makes_is_named(qwen1: BytePairTokenizer) -> None:
    tokens = [bytes_from_alphabet(c) for c in BYTE_ALPHABET] + [b"xyz"]
    vocabulary = replace(
        qwen1.vocabulary, tokens=tuple(tokens), control={}, special_ids=frozenset()
    )
    tokenizer = BytePairTokenizer(vocabulary)
    assert tokenizer.encode("xyz") == [256]  # as tiktoken does: the whole piece is a token
    assert tokenizer.encode("xyzz") == [ord(c) for c in "xyzz"]
    with pytest.raises(TokenizerError, match=r"token 256, b'xyz', comes about by no merge"):
        listed_merges(tokenizer)
