"""A tokenizer by the path of whatever holds one: a model, or a vocabulary file alone."""

from __future__ import annotations

from pathlib import Path

from qwenkit.tokenizer import BytePairTokenizer, from_gguf, from_path


def open_tokenizer(path: Path) -> BytePairTokenizer:
    """The tokenizer of a model folder or GGUF, or of a `.tiktoken` or `tokenizer.json` file.

    Raises TokenizerError naming file and field, ModelNotFoundError or CheckpointError.
    """
    is_plain_folder = path.is_dir() and not any(path.glob("*.gguf"))
    if is_plain_folder or path.suffix in (".json", ".tiktoken"):
        return from_path(path)
    from qwenkit.checkpoint.folder import open_checkpoint  # imports torch, which takes seconds

    checkpoint = open_checkpoint(path)
    if checkpoint.folder is None:
        return from_gguf(checkpoint.gguf_metadata)
    return from_path(checkpoint.folder)
