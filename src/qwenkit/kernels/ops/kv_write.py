"""Putting new keys and values where a paged cache keeps them (arXiv 2309.06180)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.kernels import kv_int4
from qwenkit.kernels.registry import Arguments, Op


def _reference(
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """k and v [tokens, kv_heads, head_dim] (rows may be strided), the caches [blocks, block_tokens,
    kv_heads, head_dim] in fp32, bf16 (rounded to the nearest, ties to even) or int8, `slots`
    [tokens] int64, no slot twice.

    int8 caches have `key_scales` and `value_scales` [blocks, block_tokens, kv_heads] fp32: one for
    each token and head, its largest magnitude / 127, so that a row is its integers times its scale.
    A row that is not finite has a scale that is not finite either.

    uint8 caches are [blocks, block_tokens, kv_heads, row bytes] and keep four bits of a number, as
    `kernels.kv_int4` lays them out.
    """
    for rows, cache, scales in ((k, key_cache, key_scales), (v, value_cache, value_scales)):
        if cache.dtype is torch.uint8:
            cache.flatten(0, 1).index_copy_(0, slots, kv_int4.quantize(rows.float()))
        elif scales is None:
            cache.flatten(0, 1).index_copy_(0, slots, rows.to(cache.dtype))
        else:
            quants, factors = _quantize(rows.float())
            cache.flatten(0, 1).index_copy_(0, slots, quants)
            scales.flatten(0, 1).index_copy_(0, slots, factors)


def _quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [tokens, kv_heads, head_dim] int8 and scales [tokens, kv_heads] of fp32 rows."""
    scales = rows.abs().amax(-1) / 127  # [tokens, kv_heads]
    quotients = (rows / scales[..., None]).nan_to_num(nan=0.0)  # 0/0 in a row of zeros
    return quotients.round().clamp(-127, 127).to(torch.int8), scales


def _shape(
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    return None


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for tokens, kv_heads, head_dim, blocks, block_tokens in (
        (1, 1, 2, 1, 1),
        (3, 2, 64, 4, 16),
        (33, 3, 7, 9, 5),
        (17, 2, 80, 3, 16),
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
        yield wide, _awkward(v), narrow[0].clone(), narrow[1].clone(), slots
        small, scales = caches.to(torch.int8), caches[..., 0]
        for rows in (v, _awkward(v)):
            pair = scales[0].clone(), scales[1].clone()
            yield wide, rows, small[0].clone(), small[1].clone(), slots, *pair
            yield wide, rows, *_bytes(caches).unbind(), slots
        yield _offset(v), _awkward(_offset(k)), *_bytes(caches).unbind(), slots


def _bytes(caches: torch.Tensor) -> torch.Tensor:
    """Both caches for four bits a number, full of something."""
    shape = *caches.shape[:-1], kv_int4.row_bytes(caches.shape[-1])
    return torch.full(shape, 99, dtype=torch.uint8)


def _offset(rows: torch.Tensor) -> torch.Tensor:
    """Rows far from zero, on either side, whose minimum must be rounded."""
    signs = 1 - 2 * (torch.arange(rows.shape[2]) // 40 % 2)  # [head_dim]
    return rows + signs * 100.3


def _awkward(rows: torch.Tensor) -> torch.Tensor:
    """Rows of zeros, outliers, numbers next to nothing, not finite; ties of both roundings."""
    rows = rows.clone()
    rows[::7] = 0
    rows[1::7, :, 1] = 1e3
    rows[2::7] = 1e-44
    rows[3::7, :, 0] = torch.inf
    rows[4::7, :, -1] = torch.nan
    ties = torch.arange(rows.shape[2]) % 120 + 0.5  # [head_dim]
    rows[5::7] = ties
    rows[5::7, :, 0] = 127
    rows[6::7] = (1 + ties / 128) * 3e38  # the largest that bf16 has, and beyond
    return rows


kv_write = Op(
    name="kv_write",
    schema=(
        "(Tensor k, Tensor v, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots, "
        "Tensor(c!)? key_scales=None, Tensor(d!)? value_scales=None) -> ()"
    ),
    reference=_reference,
    shape=_shape,
    cases=_cases,
    tolerance=0.0,
)
