"""The tokenizers library, reading the files that qwenkit writes, gives the same ids."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwenkit.tokenizer import BytePairTokenizer, from_folder, from_gguf, from_tiktoken, write_folder
from qwenkit.tokenizer.bpe import BYTE_ALPHABET, PRE_TOKENIZERS
from qwenkit.tokenizer.export import listed_merges

pytestmark = pytest.mark.oracle
transformers = pytest.importorskip("transformers")

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>")
PARTS = (
    *("Hello", " world", "don't", "WE'LL", "'ſ", "x" * 50, "ß", "2024", "½", " 7", "３"),
    *(" ", "   ", "\t", "\n", "\r\n", " \n\n ", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c", "\0"),
    *("!?", "...", "_", "(); ", "，。", "——", "\u200d", "\ufeff", "€"),
    *("你好", "日本語", "안녕", "Привет", "עברית", "العربية", "ไทย", "नमस्ते", "កាន់"),
    *("e\u0301", "\u0301\u0316", "ϒ\u0301", "\u212b", "가", "😀", "👨‍👩‍👧"),
    *CONTROL,
)


def _corpus(count: int) -> list[str]:
    rng = random.Random(11)
    return ["".join(rng.choices(PARTS, k=rng.randrange(1, 25))) for _ in range(count)]


@pytest.fixture(scope="module")
def qwen2() -> BytePairTokenizer:
    """Qwen2's tokenizer, made of the first generation's vocabulary."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("needs the vocabulary in the package dashscope")
    folder = Path(spec.submodule_search_locations[0]) / "resources"
    first = from_tiktoken(folder / "qwen.tiktoken")
    regular = len(first.vocabulary.regular_ids())
    control = {text: regular + i for i, text in enumerate(CONTROL)}
    return BytePairTokenizer(
        replace(
            first.vocabulary,
            tokens=first.vocabulary.tokens[:regular] + tuple(t.encode() for t in CONTROL),
            control=control,
            special_ids=frozenset(list(control.values())[:3]),
            merges=listed_merges(first),
            normalization="segments",
            whole_piece_first=False,
        )
    )


def _check(ours: BytePairTokenizer, theirs: Any, texts: list[str]) -> None:
    assert len(theirs) == ours.vocab_size
    for text in texts:
        ids = ours.encode(text, allowed_special="all")
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        plain = ours.encode(text)
        if not any(control in text for control in ours.control_tokens):
            assert plain == ids
        for skip in (False, True):
            decoded = theirs.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
            assert decoded == ours.decode(ids, skip_special=skip)


def test_qwen2_from_tokenizer_json(qwen2: BytePairTokenizer, tmp_path: Path) -> None:
    write_folder(qwen2, tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    _check(qwen2, theirs, _corpus(1500))


def test_qwen2_from_a_whole_folder(qwen2: BytePairTokenizer, tmp_path: Path) -> None:
    write_folder(qwen2, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__.startswith("Qwen2Tokenizer")
    assert theirs.convert_tokens_to_ids("<tool_call>") == qwen2.control_tokens["<tool_call>"]
    _check(qwen2, theirs, _corpus(300))


def test_files_that_transformers_writes(qwen2: BytePairTokenizer, tmp_path: Path) -> None:
    write_folder(qwen2, tmp_path / "ours")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(
        tmp_path / "theirs"
    )
    again = from_folder(tmp_path / "theirs")
    assert again.control_tokens == qwen2.control_tokens
    assert again.special_ids == qwen2.special_ids
    for text in _corpus(200):
        assert again.encode(text) == qwen2.encode(text)


def _trained(kind: str, folder: Path) -> Any:
    """A vocabulary that the tokenizers library itself trained, with control tokens first."""
    library = pytest.importorskip("tokenizers")
    pre_tokenizers = library.pre_tokenizers
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    steps = {
        "gpt-2": [byte_level],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level],
        "llama-bpe": [
            pre_tokenizers.Split(library.Regex(PRE_TOKENIZERS["llama-bpe"].stages[0]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }[kind]
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=sorted(BYTE_ALPHABET),
        special_tokens=list(CONTROL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(3000), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe"])
def test_vocabularies_that_the_library_trained(kind: str, tmp_path: Path) -> None:
    theirs = _trained(kind, tmp_path)
    ours = from_folder(tmp_path)
    assert ours.vocabulary.pre_tokenizer.name == kind
    _check(ours, theirs, _corpus(1500))
    write_folder(ours, tmp_path / "again")
    again = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "again" / "tokenizer.json")
    )
    _check(ours, again, _corpus(200))


def test_bytes_without_a_token_are_dropped_alike(tmp_path: Path) -> None:
    letters = [*"abcdefghij!.", "Ġ", "Ã", "©"]
    ours = from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": ["<|end|>", *letters, "ab", "!!", "Ġc"],
            "tokenizer.ggml.token_type": [3] + [1] * (len(letters) + 3),
            "tokenizer.ggml.merges": ["a b", "! !", "Ġ c"],
        }
    )
    write_folder(ours, tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    rng = random.Random(3)
    for _ in range(500):
        text = "".join(rng.choices(["a", "b", " c", "!", "é", "x", "\x04", "😀", "1"], k=9))
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
