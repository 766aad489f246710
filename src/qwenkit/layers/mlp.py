"""The gated feed-forward part of a decoder block, SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import nn

from qwenkit.kernels.ops.silu_mul import silu_mul
from qwenkit.layers.linear import Linear
from qwenkit.layers.norm import RMSNorm
from qwenkit.layers.weight import QuantWeight


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), no biases; names as in Qwen2 and Llama checkpoints."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        norm: RMSNorm | None = None,
    ) -> torch.Tensor:
        """x [tokens, hidden_size], normalised by `norm`, to the same shape; `residual`, of that
        shape, is added.
        """
        y: torch.Tensor = self.down_proj(gated(x, self.gate_proj, self.up_proj, norm), residual)
        return y


def gated(
    x: torch.Tensor, gate: nn.Module, up: nn.Module, norm: RMSNorm | None = None
) -> torch.Tensor:
    """silu(gate(n)) · up(n) with n = norm(x): [tokens, intermediate_size]; in one product where the
    weights have one, the same otherwise.
    """
    if type(gate) is Linear and type(up) is Linear and gate.bias is up.bias is None:
        first, second = gate.weight, up.weight
        if isinstance(first, QuantWeight) and isinstance(second, QuantWeight):
            given = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            together = first.gated(x, second, *given)
            if together is not None:
                return together
    x = x if norm is None else norm(x)
    hidden: torch.Tensor = silu_mul(gate(x), up(x))
    return hidden
