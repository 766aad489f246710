"""Putting new keys and values where a paged cache keeps them (arXiv 2309.06180)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.kernels.registry import Arguments, Op


def _reference(
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """k and v [tokens, kv_heads, head_dim] (rows may be strided), the caches [blocks, block_tokens,
    kv_heads, head_dim] in the same dtype, `slots` [tokens] int64, no slot twice.
    """
    key_cache.flatten(0, 1).index_copy_(0, slots, k)
    value_cache.flatten(0, 1).index_copy_(0, slots, v)


def _shape(
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    return None


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for tokens, kv_heads, head_dim, blocks, block_tokens in (
        (1, 1, 2, 1, 1),
        (3, 2, 64, 4, 16),
        (33, 3, 7, 9, 5),
    ):
        k = torch.randn(tokens, kv_heads, head_dim, generator=generator)
        v = torch.randn(tokens, kv_heads, head_dim, generator=generator)
        caches = torch.randn(2, blocks, block_tokens, kv_heads, head_dim, generator=generator)
        slots = torch.randperm(blocks * block_tokens, generator=generator)[:tokens]
        yield k, v, caches[0].clone(), caches[1].clone(), slots
        wide = torch.cat((v, k, v), 1)[:, kv_heads : 2 * kv_heads]  # k as a part of something wider
        yield wide, v, caches[0].clone(), caches[1].clone(), slots
        narrow = caches.to(torch.bfloat16)
        yield k.to(narrow.dtype), v.to(narrow.dtype), narrow[0].clone(), narrow[1].clone(), slots


kv_write = Op(
    name="kv_write",
    schema="(Tensor k, Tensor v, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots) -> ()",
    reference=_reference,
    shape=_shape,
    cases=_cases,
    tolerance=0.0,
)
