"""What an opened checkpoint is, whatever file container it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

Container = Literal["safetensors", "torch_bin", "gguf"]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as it lies in a file.

    `shape` is the logical shape, row-major, outermost first (a GGUF's dimensions reversed).
    `storage` is the tag of how numbers are stored: a plain dtype ("F32", "F16", "BF16", "F64",
    "I8", "U8", "I16", "I32", "I64", "BOOL", "F8_E4M3", "F8_E5M2") or a GGML block type ("Q4_0",
    "Q8_0", "Q6_K", …). `read()` returns a memory-mapped, read-only view: of `shape` and its dtype
    for a plain dtype; uint8 [..., bytes_per_row] for a block type. Nothing is copied or converted.
    `release()`, where there is one, lets the memory go that reading its file has filled; views stay
    valid and are read from the file again.
    """

    name: str
    shape: tuple[int, ...]
    storage: str
    size_bytes: int
    file: Path
    read: Callable[[], torch.Tensor] = field(repr=False, compare=False)
    release: Callable[[], None] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: everything it says, nothing loaded yet.

    `config` has the keys of a Hugging Face `config.json`; for a GGUF it is made from the metadata.
    `gguf_metadata` is empty unless the container is GGUF. `folder` holds the tokenizer files of a
    folder checkpoint (None for a GGUF).
    """

    name: str
    path: Path
    container: Container
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    folder: Path | None = None
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    licence: str | None = None
    gguf_metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
