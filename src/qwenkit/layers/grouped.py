"""Many linear layers of one shape as one: the experts of a mixture.

The weights stand below each other in one matrix, so that each group's is a range of its rows; the
rows of the input come sorted by group. In published checkpoints every group has a path of its own:
group 3 of `mlp.experts.gate_proj` is `mlp.experts.3.gate_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from qwenkit.kernels.ops.grouped_matmul import grouped_matmul
from qwenkit.layers.weight import QuantWeight


class GroupedLinear(nn.Module):
    """y = x W_gᵀ for the rows x of group g.

    `weight` is [groups * out_features, in_features], a parameter or a `QuantWeight`; group g has
    the rows from g * out_features on.
    """

    weight: nn.Parameter | QuantWeight

    def __init__(self, groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.groups = groups
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(groups * out_features, in_features))

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """x [rows, in_features] sorted by group to [rows, out_features].

        `ends` [groups] int64: the rows of group g are those from ends[g - 1] (0 for the first) up
        to ends[g].
        """
        if isinstance(self.weight, QuantWeight):
            return self.weight.grouped_matmul(x, ends)
        y: torch.Tensor = grouped_matmul(x, self.weight, ends)
        return y

    def published_paths(self, path: str) -> Iterator[str]:
        """The path of each group in published checkpoints, `path` being that of this module."""
        parent, _, name = path.rpartition(".")
        return (f"{parent}.{group}.{name}" for group in range(self.groups))

    def group_weight(self, group: int) -> torch.Tensor | QuantWeight:
        """The weight of one group [out_features, in_features]; a view where the format allows."""
        start = group * self.out_features
        if isinstance(self.weight, QuantWeight):
            return self.weight.row_range(start, start + self.out_features)
        return self.weight[start : start + self.out_features]

    def extra_repr(self) -> str:
        return f"{self.groups} × ({self.in_features} → {self.out_features})"
