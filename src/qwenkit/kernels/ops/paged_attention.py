"""Causal attention over a paged cache (arXiv 2309.06180) with grouped keys and values
(arXiv 2305.13245), for any mixture of decoding sequences and chunks of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from qwenkit.kernels.registry import Arguments, Op


def _reference(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_lengths: torch.Tensor,
    kv_lengths: torch.Tensor,
) -> torch.Tensor:
    """q [tokens, heads, head_dim] (rows may be strided): the chunks of all sequences one after
    another; the result is a contiguous tensor of its shape.

    The caches are [blocks, block_tokens, kv_heads, head_dim] and hold the chunks' own keys and
    values already. `block_tables` [sequences, most_blocks], `query_lengths` and `kv_lengths`
    [sequences] are int64; a chunk's queries are the last of its sequence's `kv_length` tokens.
    Scores are scaled by head_dim^-0.5. What lies in the cache beyond a sequence's length is never
    read: it may be NaN.
    """
    block_tokens = key_cache.shape[1]
    outputs, first = [], 0
    for index, (length, kv_length, table) in enumerate(
        zip(query_lengths.tolist(), kv_lengths.tolist(), block_tables.tolist(), strict=True)
    ):
        used = -(-kv_length // block_tokens)
        if table[:used] == list(range(table[0], table[0] + used)):  # in a row: nothing to copy
            start = table[0] * block_tokens
            k = key_cache.flatten(0, 1)[start : start + kv_length]
            v = value_cache.flatten(0, 1)[start : start + kv_length]
        else:
            blocks = block_tables[index, :used]  # [used]
            k = key_cache.index_select(0, blocks).flatten(0, 1)[:kv_length]
            v = value_cache.index_select(0, blocks).flatten(0, 1)[:kv_length]
        outputs.append(_attend(q[first : first + length], k, v))  # [length, heads, head_dim]
        first += length
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One sequence: q [length, heads, head_dim], k and v [kv_length, kv_heads, head_dim]."""
    length, heads, head_dim = q.shape
    kv_length, kv_heads, _ = k.shape
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]  # [1, kv_heads, kv_length, head_dim]
    if length == 1:  # sees everything: the heads of a group are so many queries of one head
        q = q.reshape(1, kv_heads, heads // kv_heads, head_dim)  # [1, kv_heads, group, head_dim]
        output = functional.scaled_dot_product_attention(q, k, v)  # [1, kv_heads, group, head_dim]
        return output.reshape(1, heads, head_dim)
    mask = None
    if length < kv_length:
        mask = torch.ones(length, kv_length, dtype=torch.bool, device=q.device)
        mask = mask.tril(kv_length - length)  # [length, kv_length]
    output = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
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
) -> torch.Tensor:
    return q.new_empty(q.shape)


def _cases() -> Iterator[Arguments]:
    """(query_length, kv_length) of each sequence; everything unused in the caches is NaN."""
    generator = torch.Generator().manual_seed(0)
    for heads, kv_heads, head_dim, block_tokens, sequences in (
        (1, 1, 2, 1, ((1, 1),)),
        (4, 2, 8, 16, ((1, 33),)),
        (9, 3, 64, 16, ((1, 1), (1, 16), (1, 17), (1, 100))),
        (14, 2, 64, 16, ((1, 5), (20, 20), (7, 30), (1, 48), (16, 32))),
        (6, 6, 10, 5, ((13, 13),)),
        (2, 1, 128, 16, ((3, 70), (1, 9))),
    ):
        q = torch.randn(sum(n for n, _ in sequences), heads, head_dim, generator=generator)
        lengths = torch.tensor(sequences).T.contiguous().unbind()
        shape = (block_tokens, kv_heads, head_dim)
        for scattered in (False, True):
            caches = _filled(lengths[1].tolist(), shape, scattered, generator)
            yield q, *caches, *lengths
            yield q * 30, *caches, *lengths  # one key takes all


def _filled(
    kv_lengths: list[int], block_shape: tuple[int, int, int], scattered: bool, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Caches with random keys and values for sequences of the given lengths, and their blocks."""
    block_tokens = block_shape[0]
    needed = [-(-length // block_tokens) for length in kv_lengths]
    count = sum(needed) + 3
    order = torch.randperm(count, generator=rng) if scattered else torch.arange(count)
    caches = torch.full((2, count, *block_shape), torch.nan)
    tables = torch.zeros(len(kv_lengths), max(needed), dtype=torch.int64)
    first = 0
    for table, blocks, length in zip(tables, needed, kv_lengths, strict=True):
        table[:blocks] = order[first : first + blocks]
        first += blocks
        places = torch.arange(length)
        slots = table[places // block_tokens] * block_tokens + places % block_tokens  # [length]
        caches.flatten(1, 2)[:, slots] = torch.randn(2, length, *block_shape[1:], generator=rng)
    return caches[0], caches[1], tables


paged_attention = Op(
    name="paged_attention",
    schema=(
        "(Tensor q, Tensor key_cache, Tensor value_cache, Tensor block_tables, "
        "Tensor query_lengths, Tensor kv_lengths) -> Tensor"
    ),
    reference=_reference,
    shape=_shape,
    cases=_cases,
)
