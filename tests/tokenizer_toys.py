"""A toy vocabulary in every layout of file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwenkit.tokenizer.bpe import BYTE_ALPHABET

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENS = [*BYTE_ALPHABET, "ab", "Ġab", "abc"]
MERGES = ["a b", "Ġ ab", "ab c"]


def toy_vocab() -> dict[str, int]:
    return {token: i for i, token in enumerate(TOKENS)}


def tokenizer_json() -> dict[str, Any]:
    return {
        "added_tokens": [
            {"id": 259, "content": "<|im_start|>", "special": True},
            {"id": 260, "content": "<think>", "special": False},
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": QWEN2_PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "unk_token": None, "vocab": toy_vocab(), "merges": list(MERGES)},
    }


def gguf() -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*TOKENS, "<|im_start|>", "<think>", "[PAD261]"],
        "tokenizer.ggml.token_type": [1] * 259 + [3, 4, 5],
        "tokenizer.ggml.merges": list(MERGES),
    }


def write(folder: Path, content: object, name: str = "tokenizer.json") -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def split_files(folder: Path, **config: Any) -> Path:
    write(folder, toy_vocab(), "vocab.json")
    write(folder, "#version: 0.2\n" + "\n".join(MERGES) + "\n", "merges.txt")
    decoder = {
        "259": {"content": "<|im_start|>", "special": True},
        "260": {"content": "<think>", "special": False},
    }
    return write(folder, {"added_tokens_decoder": decoder} | config, "tokenizer_config.json")
