"""A forward pass as the list of its kernel calls, repeated without Python.

While a pass is recorded, every kernel call is kept with its arguments, which are addresses; the
tensors behind them are kept alive. Repeating the calls computes the same from whatever the input
tensors hold by then. That is the pass only if nothing but kernels computed in it, so a recording
refuses any other operator that does more than make or reshape a tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwenkit.errors import KernelError
from qwenkit.kernels.cpu.bind import kernel_info
from qwenkit.kernels.cpu.library import Call, kernel, open_library, record_calls

_MAKERS = frozenset(("empty", "empty_like", "empty_strided", "new_empty"))


class NotReplayableError(Exception):
    """The pass computes with something else than native kernels."""


class _RecordedCall(ctypes.Structure):
    _fields_ = (("kernel", c_void_p), ("arguments", c_void_p))


class _Replay(ctypes.Structure):
    _fields_ = (("calls", c_void_p), ("count", c_int64))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every tensor that is made; refuses operators that compute."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[Any] = []


def _watched(
    self: _Watch, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
) -> Any:
    result = func(*args, **(kwargs or {}))
    name = func.overloadpacket.__name__
    if name not in _MAKERS and (func._schema.is_mutable or not _is_view(result, args)):
        raise NotReplayableError(name)
    self.kept.append(result)
    return result


# Put in afterwards: torch wraps what stands in the class body in its compiler, which takes more
# than a second to import.
_Watch.__torch_dispatch__ = _watched  # type: ignore[method-assign,assignment]


def _is_view(result: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether all tensors of a result are memory of the first argument, seen differently."""
    if not isinstance(arguments[0], torch.Tensor):
        return False
    place = arguments[0].untyped_storage().data_ptr()
    results = result if isinstance(result, tuple | list) else (result,)
    return all(
        isinstance(r, torch.Tensor) and r.untyped_storage().data_ptr() == place for r in results
    )


class Program:
    """The kernel calls of one recorded pass; `result` is what the pass returned, made anew by
    each `run`.
    """

    def __init__(self, calls: list[Call], result: torch.Tensor, kept: list[Any]) -> None:
        self.result = result
        self._calls, self._kept = calls, kept
        self._array = (_RecordedCall * len(self._calls))(
            *(_RecordedCall(c.kernel, ctypes.addressof(c.arguments)) for c in self._calls)
        )
        info = kernel_info()
        assert info.library is not None
        self._replay = kernel(open_library(info.library), "qk_replay", _Replay)
        self._arguments = _Replay(ctypes.addressof(self._array), len(self._calls))

    def run(self) -> torch.Tensor:
        """Compute again. Raises KernelError when a kernel refuses."""
        failed = self._replay(self._arguments)
        if failed:
            name = type(self._calls[failed - 1].arguments).__name__
            raise KernelError(f"replaying call {failed} of {len(self._calls)} ({name}) failed.")
        return self.result


def record(compute: Callable[[], torch.Tensor]) -> Program:
    """Run `compute` once and keep its kernel calls; `result` of the program is what it returned.

    Its inputs must be tensors that are refilled in place before each later run. Raises
    NotReplayableError when anything but native kernels computes in it.
    """
    watch = _Watch()
    with record_calls() as calls, watch:
        result = compute()
    return Program(calls, result, watch.kept)
