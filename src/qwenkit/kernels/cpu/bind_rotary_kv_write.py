"""Rotation and the cache's new keys and values as one Python function."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels.cpu.bind_attention import KINDS, has_heads, is_cache, with_whole_heads
from qwenkit.kernels.cpu.library import Kernel, kernel, refuse
from qwenkit.kernels.ops.rotary_kv_write import rotary_kv_write

_MOST_NUMBERS = 512  # of a head, in the kernel


class _RotaryKvWrite(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "cos", "sin", "factors", "guard")),
        *(
            (name, c_void_p)
            for name in ("keys", "values", "key_scales", "value_scales", "slots", "out")
        ),
        *((name, c_int64) for name in ("tokens", "heads", "kv_heads", "head_dim")),
        *((name, c_int64) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, c_int64) for name in ("capacity", "kind", "threads")),
    )


def bind_rotary_kv_write(library: ctypes.CDLL) -> Kernel:
    call = kernel(library, "qk_rotary_kv_write", _RotaryKvWrite)
    float32, reference = torch.float32, rotary_kv_write.reference

    def run(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slots: torch.Tensor,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
        factors: torch.Tensor | None = None,
        guard: torch.Tensor | None = None,
    ) -> torch.Tensor:
        cache = key_cache, value_cache, key_scales, value_scales
        kind = KINDS.get(key_cache.dtype)
        narrow = not q.dtype is k.dtype is v.dtype is cos.dtype is sin.dtype is float32
        if narrow or kind is None or q.shape[-1] > _MOST_NUMBERS or not q.numel():
            given = (q, k, v, cos, sin, *cache[:2], slots, *cache[2:], factors, guard)
            return reference(*given)  # type: ignore[no-any-return]
        _check(q, k, v, cos, sin, slots, factors, guard)
        _check_cache(k, *cache)
        q, k, v = with_whole_heads(q), with_whole_heads(k), with_whole_heads(v)
        cos, sin, slots = cos.contiguous(), sin.contiguous(), slots.contiguous()
        y = q.new_empty(q.shape)
        arguments = _RotaryKvWrite(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            None if factors is None else factors.data_ptr(),
            None if guard is None else guard.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            None if key_scales is None else key_scales.data_ptr(),
            None if value_scales is None else value_scales.data_ptr(),
            slots.data_ptr(),
            y.data_ptr(),
            *q.shape[:2],
            *k.shape[1:],
            q.stride(0),
            k.stride(0),
            v.stride(0),
            key_cache.shape[0] * key_cache.shape[1],
            kind,
            torch.get_num_threads(),
        )
        if call(arguments):
            raise KernelError(
                f"rotary_kv_write: slots lie between {slots.min()} and {slots.max()}, but the "
                f"cache has {key_cache.shape[0]} × {key_cache.shape[1]}."
            )
        return y

    return run


def _check_cache(
    k: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:
    """Raises KernelError unless this is a cache for such keys."""
    if not has_heads(keys, *k.shape[1:]) or not is_cache(keys, values, key_scales, value_scales):
        raise refuse("rotary_kv_write", k=k, keys=keys, values=values)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    factors: torch.Tensor | None,
    guard: torch.Tensor | None,
) -> None:
    """Raises KernelError unless these fit together."""
    tokens, half = q.shape[0], q.shape[-1] // 2
    if not (
        q.dim() == k.dim() == 3
        and v.shape == k.shape
        and k.shape[::2] == q.shape[::2]
        and q.shape[2] % 2 == 0
        and cos.shape == sin.shape == (tokens, half)
        and slots.shape == (tokens,)
        and slots.dtype is torch.int64
        and all(t.is_cpu for t in (k, v, cos, sin, slots))
    ):
        raise refuse("rotary_kv_write", q=q, k=k, v=v, cos=cos, sin=sin, slots=slots)
    if factors is not None and not (
        factors.shape == (tokens,)
        and factors.dtype is torch.float32
        and factors.is_contiguous()
        and factors.is_cpu
    ):
        raise refuse("rotary_kv_write", q=q, factors=factors)
    if guard is not None and not (
        guard.shape == (k.shape[1], half)
        and q.shape[1] % k.shape[1] == 0
        and guard.dtype is torch.float32
        and guard.is_contiguous()
        and guard.is_cpu
    ):
        raise refuse("rotary_kv_write", q=q, k=k, guard=guard)
