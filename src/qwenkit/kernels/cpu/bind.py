"""The native kernels as Python functions, and their registration as the ops' CPU backend.

A function takes what its op's reference takes and checks it before a pointer leaves Python. What a
kernel does not compute (another dtype, nothing at all) is given to the reference. Promised beyond
the op's contract: a row's result is the same bits whatever other rows and threads a call has.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels import build
from qwenkit.kernels.blocks import block_layout
from qwenkit.kernels.ops.block_dequantize import block_dequantize
from qwenkit.kernels.ops.block_matmul import block_matmul
from qwenkit.kernels.ops.rms_norm import rms_norm
from qwenkit.kernels.ops.rotary import rotary
from qwenkit.kernels.ops.silu_mul import silu_mul
from qwenkit.kernels.registry import OPS

_log = logging.getLogger(__name__)
_lock = threading.Lock()

Kernel = Callable[..., torch.Tensor]

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
}


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """What computes on this machine's CPU.

    `variant` and `library` are None where the torch references run; `reason` then says why.
    `shares_openmp`: the kernels work on torch's threads instead of some of their own.
    """

    features: tuple[str, ...]
    variant: str | None
    library: Path | None
    threads: int
    shares_openmp: bool
    reason: str | None


def register(*, threads: int | None = None) -> KernelInfo:
    """Make the native kernels the CPU backend of their ops, building them where need be.

    Safe to call often and from several threads. `threads` is as for `set_threads`. Where there can
    be no native kernels the references stay, which is logged once as a warning; with
    QWENKIT_KERNELS=native it raises KernelError instead.
    """
    if threads is not None:
        set_threads(threads)
    with _lock:
        info, kernels = _load()
        for name, kernel in kernels.items():
            OPS[name].backends["cpu"] = kernel
    return replace(info, threads=torch.get_num_threads())


def kernel_info() -> KernelInfo:
    """What `register` uses or would use; builds the library if it is not there yet."""
    with _lock:
        info, _ = _load()
    return replace(info, threads=torch.get_num_threads())


def set_threads(threads: int) -> None:
    """The number of threads that native kernels and torch use alike.

    There is one pool, and so one number: two would make the pool grow and shrink at every turn.
    The default is torch's, the physical cores that the process may use. Raises KernelError.
    """
    if threads < 1:
        raise KernelError(f"threads: expected at least 1, got {threads}.")
    torch.set_num_threads(threads)


@cache
def _load() -> tuple[KernelInfo, dict[str, Kernel]]:
    """The best library that this machine can build and run, and its functions by op."""
    choice = build.kernel_choice()
    features: tuple[str, ...] = ()
    if choice == "reference":
        return _without(features, "QWENKIT_KERNELS=reference"), {}
    try:
        features = cpu_features()
        variant = build.usable_variants(frozenset(features))[0]
        path = build.build_variant(variant)
        library = _open(path)
    except KernelError as error:
        if choice == "native":
            raise
        _log.warning("Running the slow torch reference kernels. %s", error)
        return _without(features, str(error)), {}
    shares = bool(library.qk_shares_openmp())
    return KernelInfo(features, variant.name, path, 0, shares, None), bind(library)


def _without(features: tuple[str, ...], reason: str) -> KernelInfo:
    return KernelInfo(features, None, None, 0, False, reason)


def cpu_features() -> tuple[str, ...]:
    """Instruction sets of this CPU that kernels may use. Raises KernelError without a compiler."""
    ask = _function(_open(build.build_probe()), "qk_features", (), c_char_p)
    found: bytes = ask()
    return tuple(found.decode().split())


def load_kernels(path: Path) -> dict[str, Kernel]:
    """The functions of a built library by op, without registering them. Raises KernelError."""
    return bind(_open(path))


def bind(library: ctypes.CDLL) -> dict[str, Kernel]:
    """One function per op that the library has."""
    return {
        "block_dequantize": _bind_block_dequantize(library),
        "block_matmul": _bind_block_matmul(library),
        "rms_norm": _bind_rms_norm(library),
        "rotary": _bind_rotary(library),
        "silu_mul": _bind_silu_mul(library),
    }


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(
            f"The native kernels in {path} cannot be loaded: {error}. Delete that file; it is "
            "built again on the next start."
        ) from error


def _function(
    library: ctypes.CDLL, name: str, arguments: tuple[Any, ...], result: Any
) -> Callable[..., Any]:
    function = getattr(library, name)
    function.argtypes = arguments
    function.restype = result
    return function  # type: ignore[no-any-return]


def _refuse(op: str, **given: torch.Tensor) -> KernelError:
    described = ", ".join(
        f"{name} {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        for name, tensor in given.items()
    )
    return KernelError(f"{op}: these do not fit together: {described}.")


def _bind_block_matmul(library: ctypes.CDLL) -> Kernel:
    pointers, sizes = (c_void_p,) * 3, (c_int64,) * 4
    call = _function(library, "qk_block_matmul", (*pointers, *sizes, c_int, c_int), c_int)
    float32, uint8, get_num_threads = torch.float32, torch.uint8, torch.get_num_threads
    reference = block_matmul.reference

    def run(x: torch.Tensor, blocks: torch.Tensor, block_type: str) -> torch.Tensor:
        number = _BLOCK_TYPES.get(block_type)
        if number is None or not x.is_floating_point() or not x.numel() or not blocks.numel():
            return reference(x, blocks, block_type)  # type: ignore[no-any-return]
        if x.dtype is not float32:
            return run(x.to(float32), blocks, block_type).to(x.dtype)
        if blocks.dtype is not uint8 or x.dim() != 2 or blocks.dim() != 2 or not blocks.is_cpu:
            raise _refuse("block_matmul", x=x, blocks=blocks)
        tokens, columns = x.shape
        rows, row_bytes = blocks.shape
        if block_layout(block_type).columns(row_bytes) != columns:
            raise _refuse(f"block_matmul of {block_type}", x=x, blocks=blocks)
        x, blocks = x.contiguous(), _with_whole_rows(blocks)
        y = x.new_empty((tokens, rows))
        status = call(
            x.data_ptr(),
            blocks.data_ptr(),
            y.data_ptr(),
            tokens,
            rows,
            columns,
            blocks.stride(0),
            number,
            get_num_threads(),
        )
        if status:
            raise KernelError(f"block_matmul: no memory for rows of {columns} columns.")
        return y

    return run


def _bind_block_dequantize(library: ctypes.CDLL) -> Kernel:
    sizes = (c_int64,) * 3
    call = _function(
        library, "qk_block_dequantize", (c_void_p, c_void_p, *sizes, c_int, c_int), None
    )
    reference = block_dequantize.reference

    def run(blocks: torch.Tensor, block_type: str, dtype: torch.dtype) -> torch.Tensor:
        number = _BLOCK_TYPES.get(block_type)
        if number is None or not blocks.numel():
            return reference(blocks, block_type, dtype)  # type: ignore[no-any-return]
        if blocks.dtype is not torch.uint8:
            raise _refuse("block_dequantize", blocks=blocks)
        columns = block_layout(block_type).columns(blocks.shape[-1])
        rows = _with_whole_rows(blocks.reshape(-1, blocks.shape[-1]))
        y = blocks.new_empty((*blocks.shape[:-1], columns), dtype=torch.float32)
        call(
            rows.data_ptr(),
            y.data_ptr(),
            rows.shape[0],
            columns,
            rows.stride(0),
            number,
            torch.get_num_threads(),
        )
        return y.to(dtype)

    return run


def _with_whole_rows(blocks: torch.Tensor) -> torch.Tensor:
    """The same rows, each of which is contiguous; rows may lie apart."""
    return blocks if blocks.stride(-1) == 1 else blocks.contiguous()


def _bind_rms_norm(library: ctypes.CDLL) -> Kernel:
    arguments = (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_int)
    call = _function(library, "qk_rms_norm", arguments, None)
    float32, empty_like, get_num_threads = torch.float32, torch.empty_like, torch.get_num_threads
    reference = rms_norm.reference

    def run(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        count = x.numel()
        if x.dtype is not float32 or weight.dtype is not float32 or not count:
            return reference(x, weight, eps)  # type: ignore[no-any-return]
        width = x.shape[-1]
        if weight.shape != (width,) or not weight.is_cpu:
            raise _refuse("rms_norm", x=x, weight=weight)
        x, weight = x.contiguous(), weight.contiguous()
        y = empty_like(x)
        call(
            x.data_ptr(),
            weight.data_ptr(),
            y.data_ptr(),
            count // width,
            width,
            eps,
            get_num_threads(),
        )
        return y

    return run


def _bind_silu_mul(library: ctypes.CDLL) -> Kernel:
    arguments = (c_void_p, c_void_p, c_void_p, c_int64, c_int)
    call = _function(library, "qk_silu_mul", arguments, None)
    float32, empty_like, get_num_threads = torch.float32, torch.empty_like, torch.get_num_threads
    reference = silu_mul.reference

    def run(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if gate.dtype is not float32 or up.dtype is not float32 or gate.shape != up.shape:
            return reference(gate, up)  # type: ignore[no-any-return]
        if not up.is_cpu:
            raise _refuse("silu_mul", gate=gate, up=up)
        gate, up = gate.contiguous(), up.contiguous()
        y = empty_like(gate)
        call(gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel(), get_num_threads())
        return y

    return run


def _bind_rotary(library: ctypes.CDLL) -> Kernel:
    call = _function(library, "qk_rotary", ((c_void_p,) * 4 + (c_int64,) * 5 + (c_int,)), None)
    float32, get_num_threads = torch.float32, torch.get_num_threads
    reference = rotary.reference

    def run(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if not (x.dtype is cos.dtype is sin.dtype is float32 and x.numel()):
            return reference(x, cos, sin)  # type: ignore[no-any-return]
        if x.dim() != 3 or not cos.is_cpu or not sin.is_cpu:
            raise _refuse("rotary", x=x, cos=cos, sin=sin)
        tokens, heads, head_dim = x.shape
        half = head_dim // 2
        if head_dim % 2 or cos.shape != (tokens, half) or sin.shape != (tokens, half):
            raise _refuse("rotary", x=x, cos=cos, sin=sin)
        if x.stride(2) != 1:
            x = x.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        y = x.new_empty((tokens, heads, head_dim))
        call(
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            y.data_ptr(),
            tokens,
            heads,
            half,
            x.stride(0),
            x.stride(1),
            get_num_threads(),
        )
        return y

    return run
