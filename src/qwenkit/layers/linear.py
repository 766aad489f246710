"""Linear and embedding layers over a plain or quantized weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from qwenkit.layers.norm import RMSNorm
from qwenkit.layers.weight import QuantWeight


class Linear(nn.Module):
    """y = x Wᵀ + b, W [out_features, in_features] being a parameter or a `QuantWeight`."""

    weight: nn.Parameter | QuantWeight
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in_features] to [..., out_features]; `residual`, of that shape, is added."""
        if isinstance(self.weight, QuantWeight):
            return self.weight.matmul(x, self.bias, residual)
        y = functional.linear(x, self.weight, self.bias)
        return y if residual is None else residual + y

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, bias={self.bias is not None}"


def project(
    x: torch.Tensor, linears: Sequence[nn.Module], norm: RMSNorm | None = None
) -> Sequence[torch.Tensor]:
    """Each of `linears` of norm(x), x [..., in_features], in one product where the weights have one
    and with the same results where not. Whatever wraps a `Linear` is called by itself.
    """
    weights = [each.weight for each in linears if type(each) is Linear]
    if len(weights) == len(linears) and isinstance(weights[0], QuantWeight):
        quantized = [weight for weight in weights if isinstance(weight, QuantWeight)]
        biases = [each.bias for each in linears if isinstance(each, Linear)]
        if len(quantized) == len(weights):
            given = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            together = weights[0].project(x, quantized, biases, *given)
            if together is not None:
                return together
    x = x if norm is None else norm(x)
    return [each(x) for each in linears]


def expected_sizes(linear: Linear, norm: RMSNorm, part: slice = slice(None)) -> torch.Tensor:
    """Root mean squares, fp32 [rows], of what the `part` of a linear layer's rows makes of numbers
    that `norm` made, were these independent and equally large before its weights.
    """
    weight = linear.weight
    if isinstance(weight, QuantWeight):
        first, last, _ = part.indices(linear.out_features)
        rows = weight.row_range(first, last).dequantize(torch.float32)
    else:
        rows = weight.detach()[part].float()
    sizes = (rows * norm.weight.detach().float()).square().sum(1)  # [rows]
    if linear.bias is not None:
        sizes = sizes + linear.bias.detach()[part].float().square()
    return sizes.sqrt()


class Embedding(nn.Module):
    """Rows of W [num_embeddings, embedding_dim], W being a parameter or a `QuantWeight`."""

    weight: nn.Parameter | QuantWeight

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim))

    def forward(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """ids [tokens] to [tokens, embedding_dim] in `dtype`."""
        if isinstance(self.weight, QuantWeight):
            return self.weight.rows(ids, dtype)
        return functional.embedding(ids, self.weight).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings} × {self.embedding_dim}"
