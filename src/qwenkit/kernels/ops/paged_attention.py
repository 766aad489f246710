"""Causal attention over a paged cache (arXiv 2309.06180) with grouped keys and values
(arXiv 2305.13245), for any mixture of decoding sequences and chunks of prompts; optionally over a
sliding window (arXiv 2004.05150) and with ALiBi's distances (arXiv 2108.12409).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional

from qwenkit.kernels import kv_int4
from qwenkit.kernels.ops.kv_write import kv_write
from qwenkit.kernels.registry import Arguments, Op


def _reference(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_lengths: torch.Tensor,
    kv_lengths: torch.Tensor,
    scale: float,
    window: int = 0,
    alibi_slopes: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [tokens, heads, head_dim] (rows may be strided): the chunks of all sequences one after
    another; the result is a contiguous tensor of its shape and dtype.

    The caches are [blocks, block_tokens, kv_heads, head_dim], fp32, bf16 or int8, and hold the
    chunks' own keys and values already; int8 caches stand for themselves times `key_scales` and
    `value_scales` [blocks, block_tokens, kv_heads] fp32, which the others do not have. uint8 caches
    have the bytes of `kernels.kv_int4` in place of a head's numbers.
    `block_tables` [sequences, most_blocks], `query_lengths` and `kv_lengths` [sequences] are
    int64; a chunk's queries are the last of its sequence's `kv_length` tokens.

    A score is q · k · scale, plus `alibi_slopes` [heads] fp32 times (key position - query
    position) if there are any. A query sees the keys up to its own, of them only the last `window`
    unless that is 0. What lies in the cache beyond a sequence's length is never read: it may be
    NaN.

    Over a bf16 cache queries are rounded to bf16 as the keys are, and a backend may round the
    weights of the values so too, which moves a result by at most 2^-8 of the largest value.
    """
    block_tokens = key_cache.shape[1]
    if key_cache.dtype is torch.bfloat16:
        q = q.to(key_cache.dtype).to(q.dtype)
    outputs, first = [], 0
    for length, kv_length, table in zip(
        query_lengths.tolist(), kv_lengths.tolist(), block_tables, strict=True
    ):
        blocks = table[: -(-kv_length // block_tokens)]  # [used]
        k = gather(key_cache, key_scales, blocks, q)[:kv_length]
        v = gather(value_cache, value_scales, blocks, q)[:kv_length]
        bias = _bias(length, kv_length, window, alibi_slopes, q)
        outputs.append(_attend(q[first : first + length], k, v, bias, scale))
        first += length
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def gather(
    cache: torch.Tensor, scales: torch.Tensor | None, blocks: torch.Tensor, q: torch.Tensor
) -> torch.Tensor:
    """What the blocks stand for, one after another: [used * block_tokens, kv_heads, head_dim], in
    the dtype of the queries.
    """
    first, used = int(blocks[0]), blocks.shape[0]
    if blocks.tolist() == list(range(first, first + used)):  # in a row: nothing to copy
        blocks_slice = slice(first, first + used)
        rows, factors = cache[blocks_slice], None if scales is None else scales[blocks_slice]
    else:
        rows = cache.index_select(0, blocks)
        factors = None if scales is None else scales.index_select(0, blocks)
    if factors is not None:
        rows = rows.to(factors.dtype) * factors[..., None]
    if rows.dtype is torch.uint8:
        rows = kv_int4.dequantize(rows, q.shape[2])
    return rows.flatten(0, 1).to(q.dtype)


def _bias(
    length: int, kv_length: int, window: int, slopes: torch.Tensor | None, q: torch.Tensor
) -> torch.Tensor | None:
    """What is added to the scores, to be broadcast to [heads, length, kv_length]; None: nothing."""
    if slopes is None and (length == 1 or length == kv_length) and not 0 < window < kv_length:
        return None
    positions = torch.arange(kv_length, device=q.device)
    distance = positions - positions[kv_length - length :, None]  # [length, kv_length]
    hidden = distance > 0
    if window:
        hidden = hidden | (distance <= -window)
    if slopes is None:
        bias = torch.zeros(length, kv_length, dtype=q.dtype, device=q.device)
    else:
        bias = (slopes[:, None, None] * distance).to(q.dtype)  # [heads, length, kv_length]
    return bias.masked_fill(hidden, -torch.inf)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """One sequence: q [length, heads, head_dim], k and v [kv_length, kv_heads, head_dim]."""
    length, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]  # [1, kv_heads, kv_length, head_dim]
    if length == 1 and bias is None:  # the heads of a group are so many queries of one head
        q = q.reshape(1, kv_heads, heads // kv_heads, head_dim)  # [1, kv_heads, group, head_dim]
        output = functional.scaled_dot_product_attention(q, k, v, scale=scale)
        return output.reshape(1, heads, head_dim)
    output = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k,
        v,
        attn_mask=None if bias is None else bias[None],
        is_causal=bias is None,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )  # [1, heads, length, head_dim]
    return output[0].transpose(0, 1).contiguous()  # [length, heads, head_dim]


def _shape(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_lengths: torch.Tensor,
    kv_lengths: torch.Tensor,
    scale: float,
    window: int = 0,
    alibi_slopes: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    return q.new_empty(q.shape)


# heads, kv_heads, head_dim, block_tokens, (query_length, kv_length) of each sequence
_Shape = tuple[int, int, int, int, tuple[tuple[int, int], ...]]
_PLAIN: tuple[_Shape, ...] = (
    (1, 1, 2, 1, ((1, 1),)),
    (4, 2, 8, 16, ((1, 33),)),
    (9, 3, 64, 16, ((1, 1), (1, 16), (1, 17), (1, 100))),
    (14, 2, 64, 16, ((1, 5), (20, 20), (7, 30), (1, 48), (16, 32))),
    (6, 6, 10, 5, ((13, 13),)),
    (2, 1, 128, 16, ((3, 70), (1, 9))),
)
_WITH_OPTIONS: tuple[_Shape, ...] = (
    (14, 2, 64, 16, ((1, 261), (4, 33), (1, 1))),
    (3, 3, 80, 7, ((1, 40), (19, 19))),
    (4, 2, 96, 16, ((5, 517),)),
    (8, 1, 128, 16, ((1, 17), (11, 59))),
    (5, 1, 10, 3, ((1, 50), (9, 10))),
)


def _cases() -> Iterator[Arguments]:
    """Everything unused in the caches is NaN."""
    generator = torch.Generator().manual_seed(0)
    for heads, kv_heads, head_dim, block_tokens, sequences in _PLAIN:
        q = torch.randn(sum(n for n, _ in sequences), heads, head_dim, generator=generator)
        lengths = torch.tensor(sequences).T.contiguous().unbind()
        shape = (block_tokens, kv_heads, head_dim)
        for scattered in (False, True):
            k, v = torch.randn(2, sum(n for _, n in sequences), *shape[1:], generator=generator)
            caches, _ = _filled(k, v, sequences, block_tokens, torch.float32, scattered)
            yield q, *caches, *lengths, head_dim**-0.5
            yield q * 30, *caches, *lengths, head_dim**-0.5  # one key takes all
    for heads, kv_heads, head_dim, block_tokens, sequences in _WITH_OPTIONS:
        q = torch.randn(sum(n for n, _ in sequences), heads, head_dim, generator=generator)
        lengths = torch.tensor(sequences).T.contiguous().unbind()
        k, v = _adversarial(sum(n for _, n in sequences), kv_heads, head_dim, generator)
        q[..., 1] *= 2**-8  # where the keys are large: softmax still has a choice to make
        slopes = torch.linspace(0.5, 0.001, heads)
        for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.uint8):
            caches, scales = _filled(k, v, sequences, block_tokens, dtype, True)
            for window, alibi in ((0, None), (13, None), (0, slopes), (256, slopes)):
                yield q, *caches, *lengths, 0.1, window, alibi, *scales


def _adversarial(
    tokens: int, kv_heads: int, head_dim: int, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with one channel as large as Qwen's, values with outliers, rows of zeros in both."""
    k, v = torch.randn(2, tokens, kv_heads, head_dim, generator=rng)
    k[..., 1] += 1000
    v[::5, :, -1] *= 100
    k[::4], v[::7] = 0, 0
    return k, v


def _filled(
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequence[tuple[int, int]],
    block_tokens: int,
    dtype: torch.dtype,
    scattered: bool,
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...]]:
    """Both caches holding k and v and the sequences' blocks; both scales. The rest is NaN."""
    needed = [-(-length // block_tokens) for _, length in sequences]
    count = sum(needed) + 3
    generator = torch.Generator().manual_seed(count)
    order = torch.randperm(count, generator=generator) if scattered else torch.arange(count)
    tables = torch.zeros(len(sequences), max(needed), dtype=torch.int64)
    slots, first = [], 0
    for table, blocks, (_, length) in zip(tables, needed, sequences, strict=True):
        table[:blocks] = order[first : first + blocks]
        first += blocks
        places = torch.arange(length)
        slots.append(table[places // block_tokens] * block_tokens + places % block_tokens)
    empty = torch.full((count, block_tokens, *k.shape[1:]), torch.nan)
    scales: tuple[torch.Tensor | None, ...] = None, None
    if dtype is torch.uint8:
        shape = *empty.shape[:3], kv_int4.row_bytes(k.shape[2])
        keys, values = (torch.full(shape, 255, dtype=dtype) for _ in "kv")  # scales of NaN
    elif dtype is torch.int8:
        keys, values = (torch.full(empty.shape, 99, dtype=dtype) for _ in "kv")
        scales = empty[..., 0].clone(), empty[..., 0].clone()
    else:
        keys, values = empty.to(dtype, copy=True), empty.to(dtype, copy=True)
    kv_write.reference(k, v, keys, values, torch.cat(slots), *scales)
    return (keys, values, tables), scales


paged_attention = Op(
    name="paged_attention",
    schema=(
        "(Tensor q, Tensor key_cache, Tensor value_cache, Tensor block_tables, "
        "Tensor query_lengths, Tensor kv_lengths, float scale, int window=0, "
        "Tensor? alibi_slopes=None, Tensor? key_scales=None, Tensor? value_scales=None) -> Tensor"
    ),
    reference=_reference,
    shape=_shape,
    cases=_cases,
    bf16_tolerance=2**-8,
)
