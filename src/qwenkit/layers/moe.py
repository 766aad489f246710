"""A mixture of experts in place of the feed-forward part (arXiv 2401.06066, 2407.10671).

The tokens are sorted by expert, so that all experts' work is one grouped product; an expert that no
token chose is not read.
"""

from __future__ import annotations

import torch
from torch import nn

from qwenkit.kernels.ops.choose_experts import Routes, choose_experts
from qwenkit.kernels.ops.mix_experts import mix_experts
from qwenkit.kernels.ops.silu_mul import silu_mul
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.linear import Linear
from qwenkit.layers.mlp import SwiGLU
from qwenkit.layers.norm import RMSNorm
from qwenkit.layers.weight import QuantWeight


class Experts(nn.Module):
    """One SwiGLU per expert, all of one shape; names as in Qwen checkpoints."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = GroupedLinear(num_experts, hidden_size, intermediate_size)
        self.up_proj = GroupedLinear(num_experts, hidden_size, intermediate_size)
        self.down_proj = GroupedLinear(num_experts, intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor, order: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden_size] to [choices, hidden_size], sorted by expert as `order` [choices]
        and `ends` [experts] of the op choose_experts say.
        """
        y: torch.Tensor = self.down_proj(self._hidden(x, order, ends), ends)
        return y

    def _hidden(self, x: torch.Tensor, order: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """[choices, intermediate_size]"""
        gate, up = self.gate_proj.weight, self.up_proj.weight
        if isinstance(gate, QuantWeight) and isinstance(up, QuantWeight):
            together = gate.grouped_gated(x, order, ends, up)
            if together is not None:
                return together
        rows = x.index_select(0, order)
        hidden: torch.Tensor = silu_mul(self.gate_proj(rows, ends), self.up_proj(rows, ends))
        return hidden


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
        weights, _, order, places, ends = self.route(x)
        outputs = self.experts(x, order, ends)  # [choices, hidden_size], sorted by expert
        shared = gate = None
        if self.has_shared_expert:
            shared, gate = self.shared_expert(x), self.shared_expert_gate(x)
        y: torch.Tensor = mix_experts(outputs, weights, places, shared, gate, residual)
        return y

    def route(self, x: torch.Tensor) -> Routes:
        """What the op choose_experts makes of x [tokens, hidden_size]: each token's experts, best
        first, and their weights, and how all choices are sorted by expert.
        """
        routes: Routes = choose_experts(self.gate(x), self.experts_per_token, self.normalise)
        return routes
