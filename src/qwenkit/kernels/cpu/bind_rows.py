"""Normalisation, gate, rotation, maxima and rows in other orders as Python functions."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels.cpu.library import Kernel, kernel, refuse
from qwenkit.kernels.ops.column_maxima import column_maxima
from qwenkit.kernels.ops.panels_of_rows import panels_of_rows
from qwenkit.kernels.ops.rms_norm import rms_norm
from qwenkit.kernels.ops.rotary import rotary
from qwenkit.kernels.ops.silu_mul import silu_mul
from qwenkit.kernels.ops.take_columns import take_columns


class _RmsNorm(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "weight", "y")),
        *((name, c_int64) for name in ("rows", "width", "threads")),
        ("eps", c_float),
    )


class _SiluMul(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("gate", "up", "y")),
        *((name, c_int64) for name in ("count", "threads")),
    )


class _Rotary(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "cos", "sin", "y")),
        *((name, c_int64) for name in ("tokens", "heads", "half", "token_stride", "head_stride")),
        ("threads", c_int64),
    )


class _ColumnMaxima(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("scores", "maxima")),
        *((name, c_int64) for name in ("rows", "count", "row_stride", "columns", "threads")),
    )


class _TakeColumns(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "order", "y")),
        *((name, c_int64) for name in ("tokens", "columns", "threads")),
    )


class _PanelsOfRows(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("rows", "panels")),
        *((name, c_int64) for name in ("row_count", "stride", "blocks", "head", "body", "flip")),
        ("threads", c_int64),
    )


def bind_rms_norm(library: ctypes.CDLL) -> Kernel:
    call = kernel(library, "qk_rms_norm", _RmsNorm)
    float32, empty_like, get_num_threads = torch.float32, torch.empty_like, torch.get_num_threads
    reference = rms_norm.reference

    def run(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        count = x.numel()
        if x.dtype is not float32 or weight.dtype is not float32 or not count:
            return reference(x, weight, eps)  # type: ignore[no-any-return]
        width = x.shape[-1]
        if weight.shape != (width,) or not weight.is_cpu:
            raise refuse("rms_norm", x=x, weight=weight)
        x, weight = x.contiguous(), weight.contiguous()
        y = empty_like(x)
        pointers = x.data_ptr(), weight.data_ptr(), y.data_ptr()
        call(_RmsNorm(*pointers, count // width, width, get_num_threads(), eps))
        return y

    return run


def bind_silu_mul(library: ctypes.CDLL) -> Kernel:
    call = kernel(library, "qk_silu_mul", _SiluMul)
    float32, empty_like, get_num_threads = torch.float32, torch.empty_like, torch.get_num_threads
    reference = silu_mul.reference

    def run(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if gate.dtype is not float32 or up.dtype is not float32 or gate.shape != up.shape:
            return reference(gate, up)  # type: ignore[no-any-return]
        if not up.is_cpu:
            raise refuse("silu_mul", gate=gate, up=up)
        gate, up = gate.contiguous(), up.contiguous()
        y = empty_like(gate)
        pointers = gate.data_ptr(), up.data_ptr(), y.data_ptr()
        call(_SiluMul(*pointers, gate.numel(), get_num_threads()))
        return y

    return run


def bind_rotary(library: ctypes.CDLL) -> Kernel:
    call = kernel(library, "qk_rotary", _Rotary)
    float32, get_num_threads = torch.float32, torch.get_num_threads
    reference = rotary.reference

    def run(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if not (x.dtype is cos.dtype is sin.dtype is float32 and x.numel()):
            return reference(x, cos, sin)  # type: ignore[no-any-return]
        if x.dim() != 3 or not cos.is_cpu or not sin.is_cpu:
            raise refuse("rotary", x=x, cos=cos, sin=sin)
        tokens, heads, head_dim = x.shape
        half = head_dim // 2
        if head_dim % 2 or cos.shape != (tokens, half) or sin.shape != (tokens, half):
            raise refuse("rotary", x=x, cos=cos, sin=sin)
        if x.stride(2) != 1:
            x = x.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        y = x.new_empty((tokens, heads, head_dim))
        pointers = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr()
        strides = x.stride(0), x.stride(1)
        call(_Rotary(*pointers, tokens, heads, half, *strides, get_num_threads()))
        return y

    return run


def bind_column_maxima(library: ctypes.CDLL) -> Kernel:
    call = kernel(library, "qk_column_maxima", _ColumnMaxima)
    float32, get_num_threads = torch.float32, torch.get_num_threads
    reference = column_maxima.reference

    def run(scores: torch.Tensor, columns: int) -> torch.Tensor:
        if scores.dtype is not float32 or not scores.numel():
            return reference(scores, columns)  # type: ignore[no-any-return]
        rows, count = scores.shape
        if not 1 <= columns <= count:
            raise refuse(f"column_maxima into {columns}", scores=scores)
        if scores.stride(1) != 1:
            scores = scores.contiguous()
        maxima = scores.new_empty((rows, columns))
        pointers = scores.data_ptr(), maxima.data_ptr()
        call(_ColumnMaxima(*pointers, rows, count, scores.stride(0), columns, get_num_threads()))
        return maxima

    return run


def bind_take_columns(library: ctypes.CDLL) -> Kernel:
    call = kernel(library, "qk_take_columns", _TakeColumns)
    reference = take_columns.reference

    def run(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        if x.dtype is not torch.float32 or not x.numel():
            return reference(x, order)  # type: ignore[no-any-return]
        if x.dim() != 2 or order.dtype is not torch.int32 or order.shape != x.shape[1:]:
            raise refuse("take_columns", x=x, order=order)
        x, order = x.contiguous(), order.contiguous()
        y = torch.empty_like(x)
        pointers = x.data_ptr(), order.data_ptr(), y.data_ptr()
        if call(_TakeColumns(*pointers, *x.shape, torch.get_num_threads())):
            raise KernelError(f"take_columns: places must be from 0 to {x.shape[1] - 1}.")
        return y

    return run


def bind_panels_of_rows(library: ctypes.CDLL) -> Kernel:
    call = kernel(library, "qk_panels_of_rows", _PanelsOfRows)
    shape, threads = panels_of_rows.shape, torch.get_num_threads

    def run(rows: torch.Tensor, head: int, body: int, flip: int) -> torch.Tensor:
        fits = rows.dim() == 2 and rows.dtype is torch.uint8 and 0 <= flip < 256
        if not fits or head < 0 or body <= 0 or body % 4 or rows.shape[1] % (head + body):
            raise refuse(f"panels_of_rows of blocks of {head} and {body} bytes", rows=rows)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        panels: torch.Tensor = shape(rows, head, body, flip)
        count, blocks = len(rows), rows.shape[1] // (head + body)
        sizes = count, rows.stride(0), blocks, head, body, flip, threads()
        call(_PanelsOfRows(rows.data_ptr(), panels.data_ptr(), *sizes))
        return panels

    return run
