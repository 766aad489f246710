"""What a model knows of attention: a context it hands its queries, keys and values to.

A model calls `context.attend(layer, q, k, v, position)` with unrotated q and k; the context rotates
them by its per-token plan and knows where earlier keys are. Training passes `PackedCausal`, serving
passes the engine's paged context; the model file is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn import functional

from qwenkit.errors import UsageError
from qwenkit.kernels.ops.rotary import rotary
from qwenkit.layers.rope import Rotary, rotary_tables

Position = Rotary | None  # the spec of a layer; None: the layer has no position embedding


class AttentionContext(Protocol):
    """One forward pass's view of the sequences that its flat tokens belong to."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        position: Position,
    ) -> torch.Tensor:
        """Causal attention within each sequence.

        q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim], unrotated; the result is
        [tokens, heads, head_dim] in q's dtype. Scores are scaled by head_dim^-0.5.
        """
        ...

    def select(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden [tokens, hidden_size] the rows whose logits are wanted: [rows, hidden_size]."""
        ...


class PackedCausal:
    """Several whole sequences, one after another in the flat tokens: training and plain forwards.

    `lengths` are the sequences' token counts and must add up to the number of tokens. Positions
    start from 0 in each sequence unless `positions` [tokens] says otherwise. All logits are kept.
    Differentiable.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        positions: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not lengths or min(lengths) < 1:
            raise UsageError(f"lengths: expected sequences of at least one token, got {lengths}.")
        self.lengths = list(lengths)
        ranges = [torch.arange(n, device=device) for n in lengths]
        self.positions = torch.cat(ranges) if positions is None else positions  # [tokens]
        self._tables: dict[Rotary, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        position: Position,
    ) -> torch.Tensor:
        """See `AttentionContext.attend`."""
        if position is not None:
            cos, sin = self._rotation(position)
            q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        sequences = zip(*(torch.split(t, self.lengths) for t in (q, k, v)), strict=True)
        return torch.cat([_causal(*sequence) for sequence in sequences])

    def select(self, hidden: torch.Tensor) -> torch.Tensor:
        """Every row."""
        return hidden

    def _rotation(self, spec: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        if spec not in self._tables:
            self._tables[spec] = rotary_tables(spec, self.positions)
        return self._tables[spec]


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of one whole sequence: q [length, heads, head_dim], k and v with kv_heads."""
    output = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],  # [1, heads, length, head_dim]
        k.transpose(0, 1)[None],  # [1, kv_heads, length, head_dim]
        v.transpose(0, 1)[None],  # [1, kv_heads, length, head_dim]
        is_causal=True,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output[0].transpose(0, 1)  # [length, heads, head_dim]
