"""The machine's ceilings, which a kernel's figures stand beside: reads, and products of each kind.

A small C++ program of its own, compiled for this very processor, so that no library's quality is
part of the measure.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels.build import find_compiler

_SOURCE = Path(__file__).with_name("ceilings.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread")
_BUFFER_BYTES = 256 << 20  # far above most caches
_SECONDS = 0.3
_REPEATS = 3
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Billions a second of all threads: bytes read, operations (two a multiply-and-add).

    None for what the processor has no instruction for. int8 and bf16 are AVX-512's; matrix units
    (AMX) are not measured.
    """

    read: float
    fp32: float
    int8: float | None
    bf16: float | None

    def of(self, kind: str) -> float | None:
        """The ceiling for products of `kind`: "fp32", "int8" or "bf16"."""
        rates = {"fp32": self.fp32, "int8": self.int8, "bf16": self.bf16}
        return rates[kind]


def measure_ceilings(threads: int) -> Ceilings:
    """The best of a few tries of each. Raises KernelError without a compiler that works."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ceilings.so"
        command = [*find_compiler(), *_FLAGS, str(_SOURCE), "-o", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelError(f"The ceilings' probe could not be compiled: {error}") from error
        if done.returncode:
            raise KernelError(f"The ceilings' probe could not be compiled: {done.stderr[-500:]}")
        probe = ctypes.CDLL(str(path)).qk_ceiling
    probe.restype = ctypes.c_double
    size, real = ctypes.c_size_t, ctypes.c_double
    probe.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, size, real)
    words = torch.zeros(_BUFFER_BYTES // 8, dtype=torch.int64)

    def best(kind: int) -> float:
        share = words.numel() // threads
        tries = (probe(kind, threads, words.data_ptr(), share, _SECONDS) for _ in range(_REPEATS))
        return float(max(tries)) / 1e9

    read, fp32, int8, bf16 = (best(kind) for kind in range(4))
    return Ceilings(read, fp32, int8 or None, bf16 or None)
