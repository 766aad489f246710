"""Attention over the paged cache: what serving gives a model as its context."""

from __future__ import annotations

import torch

from qwenkit.engine.batch import Batch, Sequences
from qwenkit.engine.kv import KVCache
from qwenkit.kernels.ops.dual_chunk_attention import dual_chunk_attention
from qwenkit.kernels.ops.kv_write import kv_write
from qwenkit.kernels.ops.paged_attention import paged_attention
from qwenkit.kernels.ops.rotary import rotary
from qwenkit.kernels.ops.rotary_kv_write import rotary_kv_write
from qwenkit.layers.position import Alibi, DualChunk, Position, Rotary, extended, score_factor
from qwenkit.layers.rope import Tables, dual_chunk_tables, log_n_scale, rotary_tables
from qwenkit.types.extension import NO_EXTENSION


class PagedAttention:
    """One forward pass of `batch` over `cache`; an `AttentionContext`.

    `tables` holds the rotations that were asked for, or those to use.
    """

    def __init__(
        self, cache: KVCache, batch: Batch, tables: dict[Rotary, Tables] | None = None
    ) -> None:
        self._cache = cache
        self._batch = batch
        self.tables: dict[Rotary, Tables] = {} if tables is None else tables
        self._chunks: _Chunks | None = None

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
        if isinstance(position, DualChunk):
            return self._in_chunks(layer, q, k, v, position)
        if isinstance(position, Rotary):
            q = self._rotate_and_keep(layer, q, k, v, position)
        else:
            self._keep(layer, k, v)
        slopes = self._slopes(position) if isinstance(position, Alibi) else None
        return self._over_cache(layer, q, self._batch.sequences, window or 0, slopes)

    def select(self, hidden: torch.Tensor) -> torch.Tensor:
        """The rows that a token is sampled from: [rows, hidden_size]."""
        rows = self._batch.rows
        return hidden if rows is None else hidden.index_select(0, rows)

    def _rotate_and_keep(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Rotary
    ) -> torch.Tensor:
        """q rotated, [tokens, heads, head_dim]; k rotated, and v, into the cache."""
        factors = None
        if spec.log_n is not None:
            factors = log_n_scale(spec.log_n, self._batch.positions)  # [tokens]
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        scales = self._cache.key_scales[layer], self._cache.value_scales[layer]
        rotated: torch.Tensor = rotary_kv_write(
            *(q, k, v, *self.rotation(spec)),
            *(keys, values, self._batch.slots, *scales),
            factors,
            self._cache.guards[layer],
        )
        return rotated

    def _keep(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        scales = self._cache.key_scales[layer], self._cache.value_scales[layer]
        kv_write(k, v, keys, values, self._batch.slots, *scales)

    def _over_cache(
        self,
        layer: int,
        q: torch.Tensor,
        sequences: Sequences,
        window: int = 0,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q [tokens, heads, head_dim] of `sequences` over their keys and values: q's shape."""
        output: torch.Tensor = paged_attention(
            q,
            self._cache.keys[layer],
            self._cache.values[layer],
            *sequences,
            q.shape[2] ** -0.5,
            window,
            slopes,
            self._cache.key_scales[layer],
            self._cache.value_scales[layer],
        )  # [tokens, heads, head_dim]
        return output

    def _in_chunks(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: DualChunk
    ) -> torch.Tensor:
        """Dual chunk attention for the sequences that go beyond one chunk, plain attention for the
        others: in one chunk it is the same, but for rounding.
        """
        if self._chunks is None:
            self._chunks = _Chunks(spec, self._batch)
        chunks = self._chunks
        q, k = _guarded(q, k, self._cache.guards[layer])
        own = rotary(q, *chunks.tables[0])  # [tokens, heads, head_dim]
        self._keep(layer, rotary(k, *chunks.tables[0]), v)
        if chunks.long_rows is None:
            return self._over_cache(layer, own, self._batch.sequences)
        output = torch.empty_like(own)
        if chunks.short_rows is not None:
            short = self._over_cache(layer, own[chunks.short_rows], chunks.short)
            output[chunks.short_rows] = short
        output[chunks.long_rows] = dual_chunk_attention(
            *(
                rotary(q, *tables)[chunks.long_rows]  # [long tokens, heads, head_dim]
                for tables in chunks.tables
            ),
            self._cache.keys[layer],
            self._cache.values[layer],
            *chunks.long,
            chunks.factors * q.shape[2] ** -0.5,
            spec.period,
            self._cache.key_scales[layer],
            self._cache.value_scales[layer],
        )
        return output

    def _slopes(self, position: Alibi) -> torch.Tensor:
        device = self._batch.ids.device
        return torch.tensor(position.slopes, dtype=torch.float32, device=device)  # [heads]

    def rotation(self, spec: Rotary) -> Tables:
        """Cosine and sine of each token, fp32 [tokens, head_dim / 2]."""
        if spec not in self.tables:
            batch = self._batch
            specs = [extended(spec, extension) for extension in batch.extensions]
            self.tables[spec] = rotary_tables(specs, batch.positions, batch.extension_index)
        return self.tables[spec]


def _guarded(
    q: torch.Tensor, k: torch.Tensor, guard: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries times and keys divided by a layer's guard, before they are rotated: rotation mixes
    only what has the same divisor.
    """
    if guard is None:
        return q, k
    divisors = torch.cat((guard, guard), 1).to(k.dtype)  # [kv_heads, head_dim]
    return q * divisors.repeat_interleave(q.shape[1] // k.shape[1], 0), k / divisors


class _Chunks:
    """What dual chunk attention needs of a batch, the same in every layer.

    `long` are the sequences that need it, `long_rows` [long tokens] their tokens (None: there are
    none) and `factors` [sequences] what their scores are multiplied by; `short` are the others.
    """

    def __init__(self, spec: DualChunk, batch: Batch) -> None:
        self.tables = dual_chunk_tables(spec, batch.positions)
        extensions = batch.sequence_extensions
        chosen = [i for i, e in enumerate(extensions) if e != NO_EXTENSION]
        rest = [i for i, e in enumerate(extensions) if e == NO_EXTENSION]
        self.long_rows, self.long = _part(batch, chosen)
        self.short_rows, self.short = _part(batch, rest)
        factors = [score_factor(spec, extensions[i]) for i in chosen]
        self.factors = torch.tensor(factors, dtype=torch.float32, device=batch.ids.device)


def _part(batch: Batch, which: list[int]) -> tuple[torch.Tensor | None, Sequences]:
    """The rows of some of the batch's sequences, None if they are none, and those sequences."""
    if not which:
        return None, batch.sequences
    index = torch.tensor(which, device=batch.ids.device)
    owner = torch.arange(len(batch.query_lengths), device=index.device)
    owner = owner.repeat_interleave(batch.query_lengths)  # [tokens]
    tables, queries, lengths = (t.index_select(0, index) for t in batch.sequences)
    return torch.isin(owner, index).nonzero().flatten(), (tables, queries, lengths)
