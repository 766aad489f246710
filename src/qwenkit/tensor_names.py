"""A checkpoint's tensors by the names that the models have, whatever its container calls them."""

from __future__ import annotations

from functools import partial

import torch

from qwenkit.checkpoint.layout import joined, reordered
from qwenkit.checkpoint.spec import Checkpoint, StoredTensor
from qwenkit.models.published import is_interleaved
from qwenkit.models.spec import Architecture


def tensors_by_our_names(
    architecture: Architecture, checkpoint: Checkpoint, head_dim: int
) -> dict[str, StoredTensor]:
    """The checkpoint's tensors by the names, and in the order of rows, that they have in the
    published weights.

    Raises CheckpointError for parts of one tensor that do not fit each other.
    """
    if checkpoint.container != "gguf":
        return joined(checkpoint.tensors, architecture.qwen2_names)
    order = partial(_halves_from_pairs, head_dim=head_dim)
    stored = {
        name: reordered(tensor, order) if is_interleaved(name, architecture) else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in joined(stored, architecture.gguf_parts).items():
        pieces = name.split(".", 2)
        number = pieces[1] if pieces[0] == "blk" and len(pieces) == 3 else ""
        pattern = f"blk.{{}}.{pieces[2]}" if number else name
        ours = architecture.gguf_names.get(pattern)
        renamed[name if ours is None else ours.replace("{}", number)] = tensor
    return renamed


def _halves_from_pairs(rows: int, head_dim: int) -> torch.Tensor:
    """For each row in rotate-half order the row that holds it in pairwise order. [rows]"""
    pairs = torch.arange(rows).view(-1, head_dim // 2, 2)  # [heads, head_dim / 2, 2]
    return pairs.transpose(1, 2).reshape(-1)
