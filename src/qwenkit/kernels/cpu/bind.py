"""The native kernels as Python functions, and their registration as the ops' CPU backend.

A function takes what its op's reference takes and checks it before a pointer leaves Python. What a
kernel does not compute (another dtype, nothing at all) is given to the reference. Promised beyond
the op's contract: a row's result is the same bits whatever other rows and threads a call has.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import threading
from ctypes import c_char_p
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels import build
from qwenkit.kernels.cpu.bind_attention import bind_kv_write, bind_paged_attention
from qwenkit.kernels.cpu.bind_blocks import bind_block_dequantize, bind_block_matmul
from qwenkit.kernels.cpu.bind_experts import bind_choose_experts, bind_mix_experts
from qwenkit.kernels.cpu.bind_low_rank import bind_add_low_rank
from qwenkit.kernels.cpu.bind_packed import (
    bind_packed_experts,
    bind_packed_gated,
    bind_packed_matmul,
    bind_packed_projections,
    bind_packed_rows,
)
from qwenkit.kernels.cpu.bind_rotary_kv_write import bind_rotary_kv_write
from qwenkit.kernels.cpu.bind_rows import (
    bind_column_maxima,
    bind_panels_of_rows,
    bind_rms_norm,
    bind_rotary,
    bind_silu_mul,
    bind_take_columns,
)
from qwenkit.kernels.cpu.bind_sampling import bind_sample_tokens
from qwenkit.kernels.cpu.library import Kernel, function, open_library
from qwenkit.kernels.cpu.place import place_helpers
from qwenkit.kernels.registry import OPS

_log = logging.getLogger(__name__)
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """What computes on this machine's CPU.

    `variant` and `library` are None where the torch references run; `reason` then says why.
    """

    features: tuple[str, ...]
    variant: str | None
    library: Path | None
    threads: int
    reason: str | None


def register(*, threads: int | None = None, pin_threads: bool = False) -> KernelInfo:
    """Make the native kernels the CPU backend of their ops, building them where need be.

    Safe to call often and from several threads. `threads` is as for `set_threads`; `pin_threads`
    gives each helper a processor of its own from now on. Where there can be no native kernels the
    references stay, which is logged once as a warning; with QWENKIT_KERNELS=native it raises
    KernelError instead, as it does where threads cannot be pinned.
    """
    if threads is not None:
        set_threads(threads)
    _keep_freed_memory()
    with _lock:
        info, kernels = _load()
        for name, kernel in kernels.items():
            importlib.import_module(f"qwenkit.kernels.ops.{name}")  # which makes the op known
            OPS[name].backends["cpu"] = kernel
    if pin_threads and info.library is not None:
        place_helpers(open_library(info.library), pin=True)
    return replace(info, threads=torch.get_num_threads())


def kernel_info() -> KernelInfo:
    """What `register` uses or would use; builds the library if it is not there yet."""
    with _lock:
        info, _ = _load()
    return replace(info, threads=torch.get_num_threads())


def set_threads(threads: int) -> None:
    """The number of threads that native kernels and torch use alike.

    They take turns, each with a pool of its own; the default is torch's, the physical cores that
    the process may use. Raises KernelError for less than one.
    """
    if threads < 1:
        raise KernelError(f"threads: expected at least 1, got {threads}.")
    torch.set_num_threads(threads)


@cache
def _keep_freed_memory() -> None:
    """Let glibc keep what large activations leave for the next layer's: given back to the system
    and taken again, their pages cost more time than the work done in them.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        trim_threshold, mmap_threshold = -1, -3
        set_option(trim_threshold, 512 << 20)
        set_option(mmap_threshold, 32 << 20)


def give_back_freed_memory() -> None:
    """Let glibc give back what it keeps: what loading needed on the way is not needed again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _load() -> tuple[KernelInfo, dict[str, Kernel]]:
    """The best library that this machine can build and run, and its functions by op."""
    choice = build.kernel_choice()
    features: tuple[str, ...] = ()
    if choice == "reference":
        return _without(features, "QWENKIT_KERNELS=reference"), {}
    try:
        features = cpu_features()
        variant, path = build.build_best(frozenset(features))
        library = open_library(path)
    except KernelError as error:
        if choice == "native":
            raise
        _log.warning("Running the slow torch reference kernels. %s", error)
        return _without(features, str(error)), {}
    return KernelInfo(features, variant.name, path, 0, None), bind(library)


def _without(features: tuple[str, ...], reason: str) -> KernelInfo:
    return KernelInfo(features, None, None, 0, reason)


def cpu_features() -> tuple[str, ...]:
    """Instruction sets of this CPU that kernels may use. Raises KernelError without a compiler."""
    ask = function(open_library(build.build_probe()), "qk_features", (), c_char_p)
    found: bytes = ask()
    return tuple(found.decode().split())


def load_kernels(path: Path) -> dict[str, Kernel]:
    """The functions of a built library by op, without registering them. Raises KernelError."""
    return bind(open_library(path))


def bind(library: ctypes.CDLL) -> dict[str, Kernel]:
    """One function per op that the library has."""
    return {
        "add_low_rank": bind_add_low_rank(library),
        "block_dequantize": bind_block_dequantize(library),
        "block_matmul": bind_block_matmul(library),
        "choose_experts": bind_choose_experts(library),
        "column_maxima": bind_column_maxima(library),
        "kv_write": bind_kv_write(library),
        "mix_experts": bind_mix_experts(library),
        "packed_experts": bind_packed_experts(library),
        "packed_gated": bind_packed_gated(library),
        "packed_matmul": bind_packed_matmul(library),
        "packed_projections": bind_packed_projections(library),
        "packed_rows": bind_packed_rows(library),
        "paged_attention": bind_paged_attention(library),
        "rms_norm": bind_rms_norm(library),
        "rotary": bind_rotary(library),
        "rotary_kv_write": bind_rotary_kv_write(library),
        "sample_tokens": bind_sample_tokens(library),
        "silu_mul": bind_silu_mul(library),
        "panels_of_rows": bind_panels_of_rows(library),
        "take_columns": bind_take_columns(library),
    }
