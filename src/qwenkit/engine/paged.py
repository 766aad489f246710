"""Attention over the paged cache: what serving gives a model as its context."""

from __future__ import annotations

import torch

from qwenkit.engine.batch import Batch
from qwenkit.engine.kv import KVCache
from qwenkit.kernels.ops.kv_write import kv_write
from qwenkit.kernels.ops.paged_attention import paged_attention
from qwenkit.kernels.ops.rotary import rotary
from qwenkit.layers.position import Alibi, Position, Rotary, extended
from qwenkit.layers.rope import Tables, log_n_scale, rotary_tables


class PagedAttention:
    """One forward pass of `batch` over `cache`; an `AttentionContext`."""

    def __init__(self, cache: KVCache, batch: Batch) -> None:
        self._cache = cache
        self._batch = batch
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
        """See `AttentionContext.attend`. The keys and values are kept in the cache."""
        if isinstance(position, Rotary):
            cos, sin = self._rotation(position)
            heads = q.shape[1]
            rotated = rotary(torch.cat((q, k), 1), cos, sin)  # [tokens, heads + kv_heads, head_dim]
            q, k = rotated[:, :heads], rotated[:, heads:]
            if position.log_n is not None:
                scale = log_n_scale(position.log_n, self._batch.positions)  # [tokens]
                q = q * scale[:, None, None].to(q.dtype)
        keys, values, batch = self._cache.keys[layer], self._cache.values[layer], self._batch
        kv_write(k, v, keys, values, batch.slots)
        output: torch.Tensor = paged_attention(
            q,
            keys,
            values,
            batch.block_tables,
            batch.query_lengths,
            batch.kv_lengths,
            q.shape[2] ** -0.5,
            window or 0,
            self._slopes(position) if isinstance(position, Alibi) else None,
        )  # [tokens, heads, head_dim]
        return output

    def select(self, hidden: torch.Tensor) -> torch.Tensor:
        """The rows that a token is sampled from: [rows, hidden_size]."""
        rows = self._batch.rows
        return hidden if rows is None else hidden.index_select(0, rows)

    def _slopes(self, position: Alibi) -> torch.Tensor:
        device = self._batch.ids.device
        return torch.tensor(position.slopes, dtype=torch.float32, device=device)  # [heads]

    def _rotation(self, spec: Rotary) -> Tables:
        if spec not in self._tables:
            batch = self._batch
            specs = [extended(spec, extension) for extension in batch.extensions]
            self._tables[spec] = rotary_tables(specs, batch.positions, batch.extension_index)
        return self._tables[spec]
