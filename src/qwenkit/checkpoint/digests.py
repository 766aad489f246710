"""What tells a model and a text from others of the same name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qwenkit.checkpoint.members import member
from qwenkit.checkpoint.spec import Checkpoint
from qwenkit.errors import CheckpointError

_BLOCKS, _BLOCK_BYTES = 64, 1 << 16  # of a file: the first, the last, and equal steps between
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "qwen.tiktoken")


def text_digest(*parts: str) -> str:
    """Of texts, one after another."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def model_digest(checkpoint: Checkpoint) -> str:
    """Of what the checkpoint says, and of its files' names, sizes and some blocks of each; where it
    lies does not matter. Raises CheckpointError for a file that cannot be read.
    """
    said = (
        checkpoint.config,
        checkpoint.tokenizer_config,
        checkpoint.generation_config,
        checkpoint.chat_template,
    )
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    files = {stored.file for stored in checkpoint.tensors.values()}
    if checkpoint.folder is not None:
        found = (member(checkpoint.folder, name) for name in _TOKENIZER_FILES)
        files |= {file for file in found if file is not None}
    for file in sorted(files, key=lambda file: file.name):
        digest.update(_outline(file))
    return digest.hexdigest()


def _outline(file: Path) -> bytes:
    """A file's name, its size and some of its blocks, as a digest: whole files of gigabytes would
    take as long as a measurement.
    """
    try:
        size = file.stat().st_size
        digest = hashlib.sha256(f"{file.name}\0{size}\0".encode())
        last = max(0, size - _BLOCK_BYTES)
        with file.open("rb") as opened:
            for place in sorted({last * step // (_BLOCKS - 1) for step in range(_BLOCKS)}):
                opened.seek(place)
                digest.update(opened.read(_BLOCK_BYTES))
    except OSError as error:
        raise CheckpointError(file, "file", f"cannot be read: {error.strerror}.") from error
    return digest.digest()
