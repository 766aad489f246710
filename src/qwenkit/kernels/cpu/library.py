"""What every binding to a native library needs: opening it, typing its functions, refusing."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenkit.errors import KernelError

Kernel = Callable[..., Any]


def open_library(path: Path) -> ctypes.CDLL:
    """Raises KernelError when the file cannot be loaded."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(
            f"The native kernels in {path} cannot be loaded: {error}. Delete that file; it is "
            "built again on the next start."
        ) from error


def function(
    library: ctypes.CDLL, name: str, arguments: tuple[Any, ...], result: Any
) -> Callable[..., Any]:
    """The C function of that name, with ctypes' types of its arguments and its result."""
    function = getattr(library, name)
    function.argtypes = arguments
    function.restype = result
    return function  # type: ignore[no-any-return]


_recording: ContextVar[list[Call] | None] = ContextVar("qwenkit_recording", default=None)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a native kernel: its address and its arguments, whose pointers may be read again
    for as long as the tensors behind them live.
    """

    kernel: int
    arguments: ctypes.Structure


@contextmanager
def record_calls() -> Iterator[list[Call]]:
    """Collects the kernel calls that this thread makes inside the block, in their order."""
    calls: list[Call] = []
    token = _recording.set(calls)
    try:
        yield calls
    finally:
        _recording.reset(token)


def kernel(
    library: ctypes.CDLL, name: str, arguments: type[ctypes.Structure]
) -> Callable[[ctypes.Structure], int]:
    """The kernel of that name: a C function of one pointer to `arguments` that returns a status,
    0 when all went well. A kernel keeps nothing between calls, so a call can be repeated.
    """
    call = function(library, name, (ctypes.POINTER(arguments),), ctypes.c_int)
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    recording = _recording.get

    def run(given: ctypes.Structure) -> int:
        calls = recording()
        if calls is not None:
            calls.append(Call(address, given))
        return call(given)  # type: ignore[no-any-return]

    return run


def refuse(op: str, **given: torch.Tensor) -> KernelError:
    """The error for tensors that do not fit together, each with its shape, dtype and device."""
    described = ", ".join(
        f"{name} {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        for name, tensor in given.items()
    )
    return KernelError(f"{op}: these do not fit together: {described}.")
