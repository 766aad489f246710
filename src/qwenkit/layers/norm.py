"""Root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import nn

from qwenkit.kernels.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) · weight; computed in fp32, cast back before weighting."""

    def __init__(self, hidden_size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden_size] to the same shape and dtype."""
        result: torch.Tensor = rms_norm(x, self.weight, self.eps)
        return result

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
