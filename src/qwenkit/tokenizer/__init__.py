"""Room 2: text ⇄ ids. Knows tiktoken and regex; no torch, no chats."""

from __future__ import annotations

from qwenkit.tokenizer.byte_pair import BytePairTokenizer
from qwenkit.tokenizer.export import (
    to_gguf_metadata,
    to_tokenizer_config,
    to_tokenizer_json,
    write_folder,
    write_tiktoken,
)
from qwenkit.tokenizer.files import from_folder, from_path, from_tiktoken
from qwenkit.tokenizer.gguf import from_gguf

__all__ = [
    "BytePairTokenizer",
    "from_folder",
    "from_gguf",
    "from_path",
    "from_tiktoken",
    "to_gguf_metadata",
    "to_tokenizer_config",
    "to_tokenizer_json",
    "write_folder",
    "write_tiktoken",
]
