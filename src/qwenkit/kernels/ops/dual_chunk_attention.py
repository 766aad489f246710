"""Dual chunk attention (arXiv 2402.17463) over a paged cache: keys count their positions from 0 in
every chunk of `period` tokens, and a query has a rotation of its own for the keys of its own chunk,
of the chunk before, and of all earlier ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.kernels import kv_int4
from qwenkit.kernels.ops.paged_attention import gather
from qwenkit.kernels.registry import Arguments, Op


def _reference(
    q: torch.Tensor,
    q_next: torch.Tensor,
    q_far: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_lengths: torch.Tensor,
    kv_lengths: torch.Tensor,
    scales: torch.Tensor,
    period: int,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """`q`, `q_next` and `q_far` [tokens, heads, head_dim] are the queries rotated for keys of their
    own chunk, of the one before and of those further back; the result is of their shape.

    The caches, their scales, the tables and lengths are `paged_attention`'s; keys are rotated by
    position modulo `period`. `scales` [sequences] fp32 multiply a sequence's scores. One softmax is
    over all keys up to the query's own.
    """
    outputs, first = [], 0
    for length, kv_length, table, scale in zip(
        query_lengths.tolist(), kv_lengths.tolist(), block_tables, scales, strict=True
    ):
        blocks = table[: -(-kv_length // key_cache.shape[1])]  # [used]
        k = gather(key_cache, key_scales, blocks, q)[:kv_length]
        v = gather(value_cache, value_scales, blocks, q)[:kv_length]
        row, last = first, first + length
        while row < last:  # the queries of one chunk see the same three parts of the keys
            position = kv_length - (last - row)
            start = position - position % period
            rows = slice(row, min(last, row + start + period - position))
            queries = [x[rows] * scale.to(x.dtype) for x in (q_far, q_next, q)]
            outputs.append(_attend(queries, k, v, start, position, period))
            row = rows.stop
        first = last
    return torch.cat(outputs)


def _attend(
    queries: list[torch.Tensor],
    k: torch.Tensor,
    v: torch.Tensor,
    start: int,
    position: int,
    period: int,
) -> torch.Tensor:
    """Queries at `position` and after, all in the chunk that begins at `start`, each [length,
    heads, head_dim] for the far, the next and the own keys; k and v [kv_length, kv_heads, head_dim]
    """
    length, heads, head_dim = queries[0].shape
    k, v = k[: position + length].transpose(0, 1), v[: position + length].transpose(0, 1)
    group = heads // k.shape[0]
    bounds = (0, max(start - period, 0), start, position + length)
    scores = torch.cat(
        [
            _by_kv_head(x, group) @ k[:, low:high].transpose(1, 2)
            for x, low, high in zip(queries, bounds[:3], bounds[1:], strict=True)
        ],
        dim=2,
    )  # [kv_heads, group * length, keys]
    places = torch.arange(position + length, device=k.device)
    hidden = (places > places[position:, None]).repeat(group, 1)  # [group * length, keys]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(2, dtype=torch.float32)
    output = weights.to(v.dtype) @ v  # [kv_heads, group * length, head_dim]
    return output.reshape(heads, length, head_dim).transpose(0, 1).contiguous()


def _by_kv_head(x: torch.Tensor, group: int) -> torch.Tensor:
    """[length, heads, head_dim] as [kv_heads, group * length, head_dim]."""
    length, heads, head_dim = x.shape
    return x.transpose(0, 1).reshape(heads // group, group * length, head_dim)


def _shape(q: torch.Tensor, *others: object) -> torch.Tensor:
    return q.new_empty(q.shape)


def _cases() -> Iterator[Arguments]:
    """(query_length, kv_length) of each sequence, around the edges of chunks."""
    generator = torch.Generator().manual_seed(0)
    for heads, kv_heads, head_dim, block_tokens, period, sequences in (
        (1, 1, 2, 1, 1, ((3, 3),)),
        (4, 2, 16, 16, 44, ((1, 30), (45, 45), (1, 89), (7, 180))),
        (9, 3, 64, 5, 8, ((1, 8), (1, 9), (1, 17), (30, 40))),
    ):
        tokens, longest = sum(n for n, _ in sequences), sum(n for _, n in sequences)
        queries = torch.randn(3, tokens, heads, head_dim, generator=generator).unbind()
        used = [-(-n // block_tokens) for _, n in sequences]
        shape = (sum(used) + 2, block_tokens, kv_heads, head_dim)
        keys, values = torch.randn(2, *shape, generator=generator)
        order = torch.randperm(shape[0], generator=generator)
        tables = torch.zeros(len(sequences), max(used), dtype=torch.int64)
        for table, blocks, end in zip(tables, used, torch.tensor(used).cumsum(0), strict=True):
            table[:blocks] = order[int(end) - blocks : int(end)]
        lengths = torch.tensor(sequences).T.contiguous().unbind()
        scales = torch.linspace(0.1, 0.5, len(sequences))
        assert longest <= shape[0] * block_tokens
        yield *queries, keys, values, tables, *lengths, scales, period
        small = [kv_int4.quantize(each) for each in (keys, values)]
        yield *queries, *small, tables, *lengths, scales, period


dual_chunk_attention = Op(
    name="dual_chunk_attention",
    schema=(
        "(Tensor q, Tensor q_next, Tensor q_far, Tensor key_cache, Tensor value_cache, "
        "Tensor block_tables, Tensor query_lengths, Tensor kv_lengths, Tensor scales, int period, "
        "Tensor? key_scales=None, Tensor? value_scales=None) -> Tensor"
    ),
    reference=_reference,
    shape=_shape,
    cases=_cases,
)
