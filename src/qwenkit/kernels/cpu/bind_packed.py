"""The ops over packed matrices as Python functions."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels.cpu.library import Kernel, kernel, refuse
from qwenkit.kernels.ops.packed_matmul import packed_matmul
from qwenkit.kernels.packed import COLUMN_MULTIPLE, KINDS, PANEL_ROWS


class PackedMatmulArguments(ctypes.Structure):
    """As in packed_matmul.cpp; `next` leads to another matrix that takes the same x."""

    _fields_ = (
        *((n, c_void_p) for n in ("x", "data", "scales", "mins", "bias", "residual", "y", "next")),
        *((n, c_int64) for n in ("tokens", "rows", "columns", "group", "kind", "zero_point")),
        *((n, c_int64) for n in ("precise", "threads")),
    )


class _PackedRows(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("ids", "data", "scales", "mins", "y")),
        *((n, c_int64) for n in ("tokens", "rows", "columns", "group", "kind", "zero_point")),
    )


def bind_packed_matmul(library: ctypes.CDLL) -> Kernel:
    call = kernel(library, "qk_packed_matmul", PackedMatmulArguments)
    float32, get_num_threads = torch.float32, torch.get_num_threads
    reference = packed_matmul.reference

    def run(
        x: torch.Tensor,
        data: torch.Tensor,
        scales: torch.Tensor | None,
        mins: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        kind: str,
        rows: int,
        zero_point: int,
        precise: bool,
    ) -> torch.Tensor:
        packed = data, scales, mins
        if not x.is_floating_point() or not x.numel() or not rows:
            given = kind, rows, zero_point, precise
            return reference(x, *packed, bias, residual, *given)  # type: ignore[no-any-return]
        if x.dtype is not float32:
            wide = x.to(float32)
            y = run(wide, *packed, bias, residual, kind, rows, zero_point, precise)
            return y.to(x.dtype)
        tokens, columns = x.shape
        _check(x, packed, kind, rows, columns)
        x = x.contiguous()
        if bias is not None:
            bias = bias.to(float32).contiguous()
        if residual is not None:
            residual = residual.to(float32).contiguous()
        if (bias is not None and bias.shape != (rows,)) or (
            residual is not None and residual.shape != (tokens, rows)
        ):
            raise KernelError(
                f"packed_matmul: bias and residual must be [{rows}] and [{tokens}, {rows}]."
            )
        y = x.new_empty((tokens, rows))
        tensors = x, data, scales, mins, bias, residual, y
        group = columns if scales is None else columns // scales.shape[1]
        sizes = tokens, rows, columns, group, KINDS.index(kind), zero_point
        how = precise, get_num_threads()
        if call(PackedMatmulArguments(*map(_address, tensors), None, *sizes, *how)):
            raise KernelError(f"packed_matmul: no memory for {tokens} rows of {columns} numbers.")
        return y

    return run


def bind_packed_rows(library: ctypes.CDLL) -> Kernel:
    call = kernel(library, "qk_packed_rows", _PackedRows)

    def run(
        ids: torch.Tensor,
        data: torch.Tensor,
        scales: torch.Tensor | None,
        mins: torch.Tensor | None,
        kind: str,
        rows: int,
        columns: int,
        zero_point: int,
    ) -> torch.Tensor:
        if ids.dtype is not torch.int64 or ids.dim() != 1:
            raise refuse("packed_rows", ids=ids, data=data)
        _check(ids, (data, scales, mins), kind, rows, columns)
        ids = ids.contiguous()
        y = torch.empty((ids.shape[0], columns), dtype=torch.float32)
        group = columns if scales is None else columns // scales.shape[1]
        sizes = ids.shape[0], rows, columns, group, KINDS.index(kind), zero_point
        if call(_PackedRows(*map(_address, (ids, data, scales, mins, y)), *sizes)):
            raise KernelError(f"packed_rows: ids must be from 0 to {rows - 1}.")
        return y

    return run


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_MOST_GROUP = 128  # columns to a scale
_BITS = {"int4": 4, "int8": 8, "bf16": 16, "fp32": 32}


def _check(
    first: torch.Tensor,
    packed: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    kind: str,
    rows: int,
    columns: int,
) -> None:
    """Raises KernelError unless every address that a kernel makes of these lies within them."""
    data, scales, mins = packed
    panels = -(-rows // PANEL_ROWS)
    fits = (
        first.is_cpu
        and data.is_cpu
        and data.is_contiguous()
        and columns % COLUMN_MULTIPLE[kind] == 0
        and data.shape == (panels, PANEL_ROWS * columns * _BITS[kind] // 8)
        and (scales is None) == (kind in ("bf16", "fp32"))
    )
    for values in (scales, mins):
        if values is not None:
            groups = values.shape[1]
            fits = (
                fits
                and values.is_contiguous()
                and values.dtype is torch.float16
                and values.shape == (panels, groups, PANEL_ROWS)
                and columns % (32 * groups) == 0
                and columns <= _MOST_GROUP * groups
            )
    if not fits:
        raise refuse(f"a packed {kind} matrix of {rows} × {columns}", first=first, data=data)
