"""Paged attention and its cache as Python functions."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels.cpu.library import Kernel, function, refuse
from qwenkit.kernels.ops.kv_write import kv_write
from qwenkit.kernels.ops.paged_attention import paged_attention


def bind_kv_write(library: ctypes.CDLL) -> Kernel:
    call = function(library, "qk_kv_write", (c_void_p,) * 5 + (c_int64,) * 5, c_int)
    float32 = torch.float32
    reference = kv_write.reference

    def run(
        k: torch.Tensor,
        v: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slots: torch.Tensor,
        *scales: torch.Tensor | None,
    ) -> None:
        if not (k.dtype is v.dtype is key_cache.dtype is value_cache.dtype is float32):
            reference(k, v, key_cache, value_cache, slots, *scales)
            return
        tokens, row = k.shape[0], k.shape[1:]
        if (
            v.shape != k.shape
            or key_cache.shape[2:] != row
            or value_cache.shape != key_cache.shape
            or slots.shape != (tokens,)
            or slots.dtype is not torch.int64
            or not (key_cache.is_contiguous() and value_cache.is_contiguous())
            or not (v.is_cpu and key_cache.is_cpu and value_cache.is_cpu and slots.is_cpu)
        ):
            raise refuse("kv_write", k=k, v=v, keys=key_cache, values=value_cache, slots=slots)
        k, v, slots = _with_whole_heads(k), _with_whole_heads(v), slots.contiguous()
        status = call(
            k.data_ptr(),
            v.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            slots.data_ptr(),
            tokens,
            row.numel(),
            k.stride(0),
            v.stride(0),
            key_cache.shape[0] * key_cache.shape[1],
        )
        if status:
            raise KernelError(
                f"kv_write: slots lie between {slots.min()} and {slots.max()}, but the cache has "
                f"{key_cache.shape[0]} × {key_cache.shape[1]}."
            )

    return run


def _with_whole_heads(x: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, head_dim], each token's numbers contiguous; tokens may lie apart."""
    whole = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    return x if whole else x.contiguous()


def bind_paged_attention(library: ctypes.CDLL) -> Kernel:
    arguments = (*(c_void_p,) * 7, *(c_int64,) * 9, c_int)
    call = function(library, "qk_paged_attention", arguments, c_int)
    float32, get_num_threads = torch.float32, torch.get_num_threads
    reference = paged_attention.reference

    def run(
        q: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        block_tables: torch.Tensor,
        query_lengths: torch.Tensor,
        kv_lengths: torch.Tensor,
        scale: float,
        window: int = 0,
        alibi_slopes: torch.Tensor | None = None,
        *scales: torch.Tensor | None,
    ) -> torch.Tensor:
        given = (q, key_cache, value_cache, block_tables, query_lengths, kv_lengths)
        plain = scale == q.shape[-1] ** -0.5 and not window and alibi_slopes is None
        if not (plain and q.dtype is key_cache.dtype is value_cache.dtype is float32):
            return reference(*given, scale, window, alibi_slopes, *scales)  # type: ignore[no-any-return]
        _check_attention(*given)
        tokens, heads, head_dim = q.shape
        blocks, block_tokens, kv_heads, _ = key_cache.shape
        q = q if q.stride(2) == 1 else q.contiguous()
        tables, lengths = block_tables.contiguous(), query_lengths.contiguous()
        kv_lengths = kv_lengths.contiguous()
        y = q.new_empty((tokens, heads, head_dim))
        status = call(
            q.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            tables.data_ptr(),
            lengths.data_ptr(),
            kv_lengths.data_ptr(),
            y.data_ptr(),
            lengths.shape[0],
            tables.shape[1],
            heads,
            q.stride(0),
            q.stride(1),
            blocks,
            block_tokens,
            kv_heads,
            head_dim,
            get_num_threads(),
        )
        if status:
            what = "a block table leads out of the cache" if status == 1 else "out of memory"
            raise KernelError(f"paged_attention: {what}.")
        return y

    return run


def _check_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_lengths: torch.Tensor,
    kv_lengths: torch.Tensor,
) -> None:
    """Raises KernelError unless every address that the kernel makes of these lies within them."""
    integers = (block_tables, query_lengths, kv_lengths)
    fits = (
        q.dim() == 3
        and key_cache.dim() == 4
        and value_cache.shape == key_cache.shape
        and q.shape[2] == key_cache.shape[3]
        and q.shape[1] % key_cache.shape[2] == 0
        and block_tables.dim() == 2
        and query_lengths.shape == kv_lengths.shape == block_tables.shape[:1]
        and key_cache.is_contiguous()
        and value_cache.is_contiguous()
        and all(t.dtype is torch.int64 for t in integers)
        and all(t.is_cpu for t in (q, key_cache, value_cache, *integers))
    )
    if not fits:
        raise refuse(
            "paged_attention",
            q=q,
            keys=key_cache,
            values=value_cache,
            block_tables=block_tables,
            query_lengths=query_lengths,
            kv_lengths=kv_lengths,
        )
    room = block_tables.shape[1] * key_cache.shape[1]
    queries, keys = query_lengths.tolist(), kv_lengths.tolist()
    if sum(queries) != q.shape[0] or not all(
        1 <= n <= m <= room for n, m in zip(queries, keys, strict=True)
    ):
        raise KernelError(
            f"paged_attention: {q.shape[0]} queries and tables for {room} keys were given, but the "
            f"lengths are {queries} queries of {keys} keys."
        )
