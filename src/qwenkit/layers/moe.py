"""A mixture of experts in place of the feed-forward part (arXiv 2401.06066, 2407.10671).

The tokens are sorted by expert, so that all experts' work is one grouped product; an expert that no
token chose is not read.
"""

from __future__ import annotations

import torch
from torch import nn

from qwenkit.kernels.ops.silu_mul import silu_mul
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.linear import Linear
from qwenkit.layers.mlp import SwiGLU
from qwenkit.layers.norm import RMSNorm


class Experts(nn.Module):
    """One SwiGLU per expert, all of one shape; names as in Qwen checkpoints."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = GroupedLinear(num_experts, hidden_size, intermediate_size)
        self.up_proj = GroupedLinear(num_experts, hidden_size, intermediate_size)
        self.down_proj = GroupedLinear(num_experts, intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """x [rows, hidden_size], sorted by expert as `ends` [experts] says, to the same shape."""
        hidden: torch.Tensor = silu_mul(
            self.gate_proj(x, ends), self.up_proj(x, ends)
        )  # [rows, intermediate]
        y: torch.Tensor = self.down_proj(hidden, ends)
        return y


class SparseMoe(nn.Module):
    """Each token's best experts by a router's softmax, weighted by it, and perhaps a shared expert
    for all tokens behind a sigmoid gate; names as in Qwen checkpoints.

    `normalise` makes the weights of the chosen experts add up to one. `shared_intermediate_size` 0
    means no shared expert.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int,
        experts_per_token: int,
        intermediate_size: int,
        normalise: bool,
        shared_intermediate_size: int = 0,
    ) -> None:
        super().__init__()
        self.experts_per_token = experts_per_token
        self.normalise = normalise
        self.gate = Linear(hidden_size, num_experts, bias=False)
        self.experts = Experts(num_experts, hidden_size, intermediate_size)
        self.has_shared_expert = shared_intermediate_size > 0
        if self.has_shared_expert:
            self.shared_expert = SwiGLU(hidden_size, shared_intermediate_size)
            self.shared_expert_gate = Linear(hidden_size, 1, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        norm: RMSNorm | None = None,
    ) -> torch.Tensor:
        """x [tokens, hidden_size], normalised by `norm`, to the same shape; `residual`, of that
        shape, is added.
        """
        x = x if norm is None else norm(x)
        weights, chosen = self.route(x)  # [tokens, experts_per_token] each
        by_expert, order = chosen.flatten().sort(stable=True)  # [tokens * experts_per_token] each
        every_expert = torch.arange(self.experts.gate_proj.groups, device=x.device)
        ends = torch.searchsorted(by_expert, every_expert, right=True)  # [experts]
        rows = x.index_select(0, order // self.experts_per_token)
        outputs = self.experts(rows, ends).index_select(0, order.argsort())
        outputs = outputs.view(
            *chosen.shape, x.shape[-1]
        )  # [tokens, experts_per_token, hidden_size]
        y: torch.Tensor = (outputs * weights[:, :, None]).sum(1)  # [tokens, hidden_size]
        if self.has_shared_expert:
            y = y + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return y if residual is None else residual + y

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [tokens, hidden_size] to each token's experts, best first, and their weights: weights
        in x's dtype and numbers int64, both [tokens, experts_per_token].
        """
        share = torch.softmax(self.gate(x), -1, dtype=_router_dtype(x))  # [tokens, experts]
        weights, chosen = share.topk(self.experts_per_token)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), chosen


def _router_dtype(x: torch.Tensor) -> torch.dtype:
    """fp32, as the models were trained; fp64 stays fp64."""
    return torch.promote_types(x.dtype, torch.float32)
