"""What every binding to a native library needs: opening it, typing its functions, refusing."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
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


def refuse(op: str, **given: torch.Tensor) -> KernelError:
    """The error for tensors that do not fit together, each with its shape, dtype and device."""
    described = ", ".join(
        f"{name} {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        for name, tensor in given.items()
    )
    return KernelError(f"{op}: these do not fit together: {described}.")
