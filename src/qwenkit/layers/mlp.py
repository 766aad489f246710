"""The gated feed-forward part of a decoder block, SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import nn

from qwenkit.kernels.ops.silu_mul import silu_mul
from qwenkit.layers.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), no biases; names as in Qwen2 and Llama checkpoints."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, hidden_size] to the same shape; `residual`, of that shape, is added."""
        hidden: torch.Tensor = silu_mul(
            self.gate_proj(x), self.up_proj(x)
        )  # [tokens, intermediate]
        y: torch.Tensor = self.down_proj(hidden, residual)
        return y
