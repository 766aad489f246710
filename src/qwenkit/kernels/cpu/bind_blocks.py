"""The ops over GGML blocks as Python functions."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels.blocks import block_layout
from qwenkit.kernels.cpu.library import Kernel, kernel, refuse
from qwenkit.kernels.ops.block_dequantize import block_dequantize
from qwenkit.kernels.ops.block_matmul import block_matmul

# GGUF's numbers of the block types that the C++ code reads.
_BLOCK_TYPES = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "IQ4_XS": 23,
}


class _BlockMatmul(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "blocks", "y")),
        *((name, c_int64) for name in ("tokens", "rows", "columns", "row_stride", "type")),
        ("threads", c_int64),
    )


class _BlockDequantize(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("blocks", "y")),
        *((name, c_int64) for name in ("rows", "columns", "row_stride", "type", "threads")),
    )


def bind_block_matmul(library: ctypes.CDLL) -> Kernel:
    call = kernel(library, "qk_block_matmul", _BlockMatmul)
    float32, uint8, get_num_threads = torch.float32, torch.uint8, torch.get_num_threads
    reference = block_matmul.reference

    def run(x: torch.Tensor, blocks: torch.Tensor, block_type: str) -> torch.Tensor:
        number = _BLOCK_TYPES.get(block_type)
        if number is None or not x.is_floating_point() or not x.numel() or not blocks.numel():
            return reference(x, blocks, block_type)  # type: ignore[no-any-return]
        if x.dtype is not float32:
            return run(x.to(float32), blocks, block_type).to(x.dtype)
        if blocks.dtype is not uint8 or x.dim() != 2 or blocks.dim() != 2 or not blocks.is_cpu:
            raise refuse("block_matmul", x=x, blocks=blocks)
        tokens, columns = x.shape
        rows, row_bytes = blocks.shape
        if block_layout(block_type).columns(row_bytes) != columns:
            raise refuse(f"block_matmul of {block_type}", x=x, blocks=blocks)
        x, blocks = x.contiguous(), _with_whole_rows(blocks)
        y = x.new_empty((tokens, rows))
        pointers = x.data_ptr(), blocks.data_ptr(), y.data_ptr()
        sizes = tokens, rows, columns, blocks.stride(0)
        if call(_BlockMatmul(*pointers, *sizes, number, get_num_threads())):
            raise KernelError(f"block_matmul: no memory for rows of {columns} columns.")
        return y

    return run


def bind_block_dequantize(library: ctypes.CDLL) -> Kernel:
    call = kernel(library, "qk_block_dequantize", _BlockDequantize)
    reference = block_dequantize.reference

    def run(blocks: torch.Tensor, block_type: str, dtype: torch.dtype) -> torch.Tensor:
        number = _BLOCK_TYPES.get(block_type)
        if number is None or not blocks.numel():
            return reference(blocks, block_type, dtype)  # type: ignore[no-any-return]
        if blocks.dtype is not torch.uint8:
            raise refuse("block_dequantize", blocks=blocks)
        columns = block_layout(block_type).columns(blocks.shape[-1])
        rows = _with_whole_rows(blocks.reshape(-1, blocks.shape[-1]))
        y = blocks.new_empty((*blocks.shape[:-1], columns), dtype=torch.float32)
        sizes = rows.shape[0], columns, rows.stride(0)
        threads = torch.get_num_threads()
        call(_BlockDequantize(rows.data_ptr(), y.data_ptr(), *sizes, number, threads))
        return y.to(dtype)

    return run


def _with_whole_rows(blocks: torch.Tensor) -> torch.Tensor:
    """The same rows, each of which is contiguous; rows may lie apart."""
    return blocks if blocks.stride(-1) == 1 else blocks.contiguous()
