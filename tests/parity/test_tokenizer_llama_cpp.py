"""llama.cpp's tokenizer on the embedded default model's own vocabulary gives the same ids."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenkit.checkpoint import open_checkpoint
from qwenkit.tokenizer import BytePairTokenizer, from_gguf, to_gguf_metadata
from qwenkit.tokenizer.bpe import BYTE_ALPHABET, PRE_TOKENIZERS

pytestmark = pytest.mark.oracle
llama_cpp = pytest.importorskip("llama_cpp")

PARTS = (
    *("Hello", " world", "don't", " it's", "x" * 50, "ß", "2024", " 7", "12 34", "a1b2"),
    *(" ", "   ", "\t", "\n", "\r\n", " \n\n ", "\u3000", "!?", "...", "_", "(); ", "，。", "€"),
    *("你好", "日本語", "안녕", "Привет", "עברית", "العربية", "ไทย", "😀", "e\u0301"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
)


@pytest.fixture(scope="module")
def ours(default_model_path: Path) -> BytePairTokenizer:
    return from_gguf(open_checkpoint(default_model_path).gguf_metadata)


@pytest.fixture(scope="module")
def theirs(default_model_path: Path) -> Iterator[Any]:
    model = llama_cpp.Llama(str(default_model_path), vocab_only=True, verbose=False)
    yield model
    model.close()


def _corpus(count: int) -> list[str]:
    rng = random.Random(5)
    return ["".join(rng.choices(PARTS, k=rng.randrange(1, 25))) for _ in range(count)]


@pytest.mark.parametrize("special", [False, True])
def test_same_ids(ours: BytePairTokenizer, theirs: Any, special: bool) -> None:
    assert ours.backend == "tiktoken"
    assert ours.vocab_size == theirs.n_vocab()
    for text in _corpus(2000):
        ids = theirs.tokenize(text.encode(), add_bos=False, special=special)
        assert ours.encode(text, allowed_special="all" if special else ()) == ids, text


def test_same_bytes(ours: BytePairTokenizer, theirs: Any) -> None:
    for token_id in range(ours.vocab_size):
        token = ours.token_bytes(token_id)
        if token_id not in ours.special_ids and len(token) < 32:  # the binding's buffer
            assert token == theirs.detokenize([token_id])


def test_code(ours: BytePairTokenizer, theirs: Any) -> None:
    text = Path(__file__).read_text("utf-8")
    assert ours.encode(text) == theirs.tokenize(text.encode(), add_bos=False, special=False)


def _small_vocabulary(pre_tokenizer: str) -> BytePairTokenizer:
    """Merges over white space, digits, punctuation and letters, so that a piece cut elsewhere gives
    other ids.
    """
    merges = ["Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ", "Ġ Ċ", "1 2", "2 3", "12 3", "Ġ 1", "! !", "! ?", "Ġ !"]
    merges += ["' s", "' S", "! Ċ", "a b", "Ġ a", "( a", "_ a", "$ 1", "+ +", "ä ½", "ł å", "½ ł"]
    tokens = ["<|im_end|>", *BYTE_ALPHABET, *(merge.replace(" ", "") for merge in merges)]
    return from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre_tokenizer,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
            "tokenizer.ggml.merges": merges,
        }
    )


def _vocabulary_file(tokenizer: BytePairTokenizer, path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    metadata = to_gguf_metadata(tokenizer)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(metadata["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(metadata["tokenizer.ggml.pre"])
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id):
        add(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_split_pattern(name: str, tmp_path: Path) -> None:
    ours = _small_vocabulary(name)
    _vocabulary_file(ours, tmp_path / "vocabulary.gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "vocabulary.gguf"), vocab_only=True, verbose=False)
    parts = ["  ", " ", "    ", "\n", "\n\n", " \n", "\t", "1", "12", "123", " 12", "!", "!!", "!?"]
    parts += [
        " !",
        "'s",
        "'S",
        "!\n",
        "ab",
        " a",
        "(a",
        "_a",
        "$1",
        "++",
        "你",
        "你好",
        "é",
        "½",
        "a",
    ]
    rng = random.Random(9)
    for _ in range(2000):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 14)))
        ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert ours.encode(text) == ids, text
    theirs.close()
