"""Rotary position embedding (arXiv 2104.09864) in the rotate-half layout that Qwen and Llama use.

inv_i = base^(-2i / head_dim) for i = 0 … head_dim/2 - 1, kept in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rotary:
    """The position spec of a layer whose queries and keys are rotated by their position."""

    head_dim: int
    base: float


def inverse_frequencies(spec: Rotary, device: torch.device) -> torch.Tensor:
    """Angular steps per position, fp32 [head_dim / 2]."""
    exponent = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device=device) / spec.head_dim
    return 1.0 / spec.base**exponent


def rotary_tables(spec: Rotary, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine for each token, two fp32 tensors [tokens, head_dim / 2].

    `positions` is [tokens], int64.
    """
    angles = positions.to(torch.float32)[:, None] * inverse_frequencies(spec, positions.device)
    return angles.cos(), angles.sin()
