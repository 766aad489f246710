"""Paged attention and its cache as Python functions."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels import kv_int4
from qwenkit.kernels.cpu.library import Kernel, kernel, refuse
from qwenkit.kernels.ops.kv_write import kv_write
from qwenkit.kernels.ops.paged_attention import paged_attention

# Of a cache, as the kernels say it.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}


class _KvWrite(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("k", "v", "keys", "values", "key_scales", "value_scales")),
        ("slots", c_void_p),
        *((name, c_int64) for name in ("tokens", "heads", "head_dim", "k_stride", "v_stride")),
        *((name, c_int64) for name in ("capacity", "kind", "threads")),
    )


class _PagedAttention(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("q", "keys", "values", "key_scales", "value_scales")),
        *((name, c_void_p) for name in ("slopes", "tables", "query_lengths", "kv_lengths", "out")),
        *((name, c_int64) for name in ("sequences", "tokens", "table_width", "heads")),
        *((name, c_int64) for name in ("token_stride", "head_stride", "blocks", "block_tokens")),
        *((name, c_int64) for name in ("kv_heads", "head_dim", "window", "kind", "threads")),
        ("scale", c_float),
    )


def bind_kv_write(library: ctypes.CDLL) -> Kernel:
    call = kernel(library, "qk_kv_write", _KvWrite)
    float32, get_num_threads = torch.float32, torch.get_num_threads
    reference = kv_write.reference

    def run(
        k: torch.Tensor,
        v: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slots: torch.Tensor,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
    ) -> None:
        kind = KINDS.get(key_cache.dtype)
        if not k.dtype is v.dtype is float32 or kind is None:
            reference(k, v, key_cache, value_cache, slots, key_scales, value_scales)
            return
        tokens, heads, head_dim = k.shape
        if (
            v.shape != k.shape
            or not has_heads(key_cache, heads, head_dim)
            or slots.shape != (tokens,)
            or slots.dtype is not torch.int64
            or not (v.is_cpu and slots.is_cpu)
            or not is_cache(key_cache, value_cache, key_scales, value_scales)
        ):
            raise refuse("kv_write", k=k, v=v, keys=key_cache, values=value_cache, slots=slots)
        k, v, slots = with_whole_heads(k), with_whole_heads(v), slots.contiguous()
        arguments = _KvWrite(
            k.data_ptr(),
            v.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            None if key_scales is None else key_scales.data_ptr(),
            None if value_scales is None else value_scales.data_ptr(),
            slots.data_ptr(),
            tokens,
            heads,
            head_dim,
            k.stride(0),
            v.stride(0),
            key_cache.shape[0] * key_cache.shape[1],
            kind,
            get_num_threads(),
        )
        if call(arguments):
            raise KernelError(
                f"kv_write: slots lie between {slots.min()} and {slots.max()}, but the cache has "
                f"{key_cache.shape[0]} × {key_cache.shape[1]}."
            )

    return run


def with_whole_heads(x: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, head_dim], each token's numbers contiguous; tokens may lie apart."""
    whole = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    return x if whole else x.contiguous()


def has_heads(cache: torch.Tensor, kv_heads: int, head_dim: int) -> bool:
    """Whether a token's place in a cache [blocks, block_tokens, kv_heads, numbers or bytes] is for
    such heads.
    """
    width = kv_int4.row_bytes(head_dim) if cache.dtype is torch.uint8 else head_dim
    return cache.shape[2:] == (kv_heads, width)


def is_cache(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> bool:
    """Whether these are the four parts of one cache, as the kernels read it."""
    if not (
        keys.dim() == 4
        and values.shape == keys.shape
        and values.dtype is keys.dtype
        and keys.is_contiguous()
        and values.is_contiguous()
        and keys.is_cpu
        and values.is_cpu
    ):
        return False
    if keys.dtype is not torch.int8:
        return key_scales is None and value_scales is None
    return all(
        s is not None
        and s.shape == keys.shape[:3]
        and s.dtype is torch.float32
        and s.is_contiguous()
        and s.is_cpu
        for s in (key_scales, value_scales)
    )


def bind_paged_attention(library: ctypes.CDLL) -> Kernel:
    call = kernel(library, "qk_paged_attention", _PagedAttention)
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
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        given = (q, key_cache, value_cache, block_tables, query_lengths, kv_lengths)
        options = (alibi_slopes, key_scales, value_scales)
        kind = KINDS.get(key_cache.dtype)
        if q.dtype is not float32 or kind is None:
            return reference(*given, scale, window, *options)  # type: ignore[no-any-return]
        _check_attention(*given, *options)
        tokens, heads, head_dim = q.shape
        q = q if q.stride(2) == 1 else q.contiguous()
        tables, lengths = block_tables.contiguous(), query_lengths.contiguous()
        kv_lengths = kv_lengths.contiguous()
        slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
        y = q.new_empty((tokens, heads, head_dim))
        arguments = _PagedAttention(
            q.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            None if key_scales is None else key_scales.data_ptr(),
            None if value_scales is None else value_scales.data_ptr(),
            None if slopes is None else slopes.data_ptr(),
            tables.data_ptr(),
            lengths.data_ptr(),
            kv_lengths.data_ptr(),
            y.data_ptr(),
            lengths.shape[0],
            tokens,
            tables.shape[1],
            heads,
            q.stride(0),
            q.stride(1),
            *key_cache.shape[:3],
            head_dim,
            window,
            kind,
            get_num_threads(),
            scale,
        )
        status = call(arguments)
        if status:
            raise _refusal(status, q, key_cache, block_tables, query_lengths, kv_lengths)
        return y

    return run


def _check_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_lengths: torch.Tensor,
    kv_lengths: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:
    """Raises KernelError unless these fit together; the kernel looks at the lengths itself."""
    integers = (block_tables, query_lengths, kv_lengths)
    if not (
        q.dim() == 3
        and is_cache(key_cache, value_cache, key_scales, value_scales)
        and has_heads(key_cache, key_cache.shape[2], q.shape[2])
        and q.shape[1] % key_cache.shape[2] == 0
        and block_tables.dim() == 2
        and query_lengths.shape == kv_lengths.shape == block_tables.shape[:1]
        and all(t.dtype is torch.int64 and t.is_cpu for t in integers)
    ):
        raise refuse(
            "paged_attention",
            q=q,
            keys=key_cache,
            values=value_cache,
            block_tables=block_tables,
            query_lengths=query_lengths,
            kv_lengths=kv_lengths,
        )
    slopes = alibi_slopes
    if slopes is not None and not (
        slopes.shape == q.shape[1:2] and slopes.dtype is torch.float32 and slopes.is_cpu
    ):
        raise refuse("paged_attention", q=q, alibi_slopes=slopes)


def _refusal(
    status: int,
    q: torch.Tensor,
    key_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_lengths: torch.Tensor,
    kv_lengths: torch.Tensor,
) -> KernelError:
    """The error for what the kernel found wrong."""
    if status == 1:
        return KernelError("paged_attention: a block table leads out of the cache.")
    if status == 2:
        return KernelError("paged_attention: out of memory.")
    room = block_tables.shape[1] * key_cache.shape[1]
    return KernelError(
        f"paged_attention: {q.shape[0]} queries and tables for {room} keys were given, but the "
        f"lengths are {query_lengths.tolist()} queries of {kv_lengths.tolist()} keys."
    )
