"""Room 3: the only readers and writers of model files. Hands out raw tensors with a storage tag;
knows no model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenkit.checkpoint.folder import open_checkpoint as open_checkpoint
    from qwenkit.checkpoint.gguf_write import write_gguf as write_gguf
    from qwenkit.checkpoint.safetensors_write import write_safetensors as write_safetensors
    from qwenkit.checkpoint.spec import Checkpoint as Checkpoint
    from qwenkit.checkpoint.spec import StoredTensor as StoredTensor

_PUBLIC = {
    "Checkpoint": "qwenkit.checkpoint.spec",
    "StoredTensor": "qwenkit.checkpoint.spec",
    "open_checkpoint": "qwenkit.checkpoint.folder",
    "write_gguf": "qwenkit.checkpoint.gguf_write",
    "write_safetensors": "qwenkit.checkpoint.safetensors_write",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:  # imported on first use: a download by name needs no torch
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'qwenkit.checkpoint' has no attribute {name!r}")
