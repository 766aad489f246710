"""What a model knows of attention: a context it hands its queries, keys and values to.

A model calls `context.attend(layer, q, k, v, position)` with unrotated q and k and the layer's
position spec; the context rotates them by what was decided for each sequence and knows where
earlier keys are. Training passes `PackedCausal`, serving passes the engine's paged context; the
model file is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch.nn import functional

from qwenkit.errors import UsageError
from qwenkit.kernels.ops.dual_chunk_attention import dual_chunk_attention
from qwenkit.kernels.ops.rotary import rotary
from qwenkit.layers.position import (
    Alibi,
    DualChunk,
    Position,
    Rotary,
    choose_extension,
    extended,
    score_factor,
)
from qwenkit.layers.rope import Tables, dual_chunk_tables, log_n_scale, rotary_tables
from qwenkit.types.extension import Extension, RopeMode

__all__ = ["AttentionContext", "ByDevice", "PackedCausal", "Position"]


class AttentionContext(Protocol):
    """One forward pass's view of the sequences that its flat tokens belong to."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        position: Position,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        """Causal attention within each sequence.

        q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim], unrotated; the result is
        [tokens, heads, head_dim] in q's dtype. Scores are scaled by head_dim^-0.5. A query sees the
        last `window` keys only, its own among them, unless that is None.
        """
        ...

    def select(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden [tokens, hidden_size] the rows whose logits are wanted: [rows, hidden_size]."""
        ...


class ByDevice:
    """One forward pass of a model whose layers are on several devices: a context for each.

    `make` makes the context of a device when the first tensor on it arrives.
    """

    def __init__(self, make: Callable[[torch.device], AttentionContext]) -> None:
        self._make = make
        self._contexts: dict[torch.device, AttentionContext] = {}

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        position: Position,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        """See `AttentionContext.attend`; on the device of q."""
        return self._on(q.device).attend(layer, q, k, v, position, window=window)

    def select(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `AttentionContext.select`; on the device of `hidden`."""
        return self._on(hidden.device).select(hidden)

    def _on(self, device: torch.device) -> AttentionContext:
        if device not in self._contexts:
            self._contexts[device] = self._make(device)
        return self._contexts[device]


class PackedCausal:
    """Several whole sequences, one after another in the flat tokens: training and plain forwards.

    `lengths` are the sequences' token counts and must add up to the number of tokens. Positions
    start from 0 in each sequence unless `positions` [tokens] says otherwise. `rope` as for a
    request of each sequence's length, whose model was trained for `trained_tokens` where its
    position spec does not say (None: for any length); `training` leaves out what the first Qwen
    leaves out in training, dynamic NTK and LogN. All logits are kept. Differentiable.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        positions: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
        rope: RopeMode = "as-config",
        trained_tokens: int | None = None,
        training: bool = False,
    ) -> None:
        if not lengths or min(lengths) < 1:
            raise UsageError(f"lengths: expected sequences of at least one token, got {lengths}.")
        self.lengths = list(lengths)
        ranges = [torch.arange(n, device=device) for n in lengths]
        self.positions = torch.cat(ranges) if positions is None else positions  # [tokens]
        self._rope: RopeMode = rope
        self._trained_tokens = max(lengths) if trained_tokens is None else trained_tokens
        self._training = training
        self._tables: dict[Rotary, Tables] = {}

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        position: Position,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        """See `AttentionContext.attend`."""
        if isinstance(position, DualChunk):
            return self._in_chunks(q, k, v, position)
        if isinstance(position, Rotary):
            q, k = self._rotated(q, k, position)
        slopes = None
        if isinstance(position, Alibi):
            slopes = torch.tensor(position.slopes, dtype=torch.float32, device=q.device)  # [heads]
        sequences = zip(*(torch.split(t, self.lengths) for t in (q, k, v)), strict=True)
        return torch.cat([_causal(q, k, v, window, slopes) for q, k, v in sequences])

    def select(self, hidden: torch.Tensor) -> torch.Tensor:
        """Every row."""
        return hidden

    def _rotated(
        self, q: torch.Tensor, k: torch.Tensor, spec: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self._rotation(spec)
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        if spec.log_n is not None and not self._training:
            q = q * log_n_scale(spec.log_n, self.positions)[:, None, None].to(q.dtype)
        return q, k

    def _in_chunks(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: DualChunk
    ) -> torch.Tensor:
        """Dual chunk attention; each sequence is a cache of one block."""
        tables = dual_chunk_tables(spec, self.positions)
        queries = [torch.split(rotary(q, cos, sin), self.lengths) for cos, sin in tables]
        keys, values = (torch.split(t, self.lengths) for t in (rotary(k, *tables[0]), v))
        outputs = []
        for index, n in enumerate(self.lengths):
            factor = score_factor(spec, self._extension(spec, n))
            length = torch.tensor([n], device=q.device)
            outputs.append(
                dual_chunk_attention(
                    *(rows[index] for rows in queries),
                    keys[index][None],
                    values[index][None],
                    torch.zeros(1, 1, dtype=torch.int64, device=q.device),
                    length,
                    length,
                    torch.tensor([q.shape[2] ** -0.5 * factor], device=q.device),
                    spec.period,
                )
            )
        return torch.cat(outputs)

    def _rotation(self, spec: Rotary) -> Tables:
        if spec not in self._tables:
            chosen = [extended(spec, self._extension(spec, n)) for n in self.lengths]
            specs = list(dict.fromkeys(chosen))
            counts = torch.tensor(self.lengths, device=self.positions.device)
            which = torch.tensor([specs.index(one) for one in chosen], device=counts.device)
            index = which.repeat_interleave(counts)  # [tokens]
            self._tables[spec] = rotary_tables(specs, self.positions, index)
        return self._tables[spec]

    def _extension(self, position: Position, length: int) -> Extension:
        return choose_extension(
            position,
            self._rope,
            trained_tokens=self._trained_tokens,
            prompt_tokens=length,
            total_tokens=length,
            training=self._training,
        )


def _causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    slopes: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one whole sequence: q [length, heads, head_dim], k and v with kv_heads; `slopes`
    [heads] are ALiBi's.
    """
    bias = None
    if slopes is not None or (window is not None and window < q.shape[0]):
        bias = _bias(q, window, slopes)
    output = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],  # [1, heads, length, head_dim]
        k.transpose(0, 1)[None],  # [1, kv_heads, length, head_dim]
        v.transpose(0, 1)[None],  # [1, kv_heads, length, head_dim]
        attn_mask=bias,
        is_causal=bias is None,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output[0].transpose(0, 1)  # [length, heads, head_dim]


def _bias(q: torch.Tensor, window: int | None, slopes: torch.Tensor | None) -> torch.Tensor:
    """What is added to the scores: [length, length], or [heads, length, length] with slopes."""
    places = torch.arange(q.shape[0], device=q.device)
    distance = places - places[:, None]  # [length, length], at most 0 for what is seen
    hidden = distance > 0
    if window is not None:
        hidden = hidden | (distance <= -window)
    bias = distance * 0.0 if slopes is None else slopes[:, None, None] * distance
    return bias.to(q.dtype).masked_fill(hidden, -torch.inf)
