"""Where the native kernels' helper threads work: one processor each on request, else anywhere.

Only the helpers are bound. The calling thread is the user's or the engine's, and every thread that
it starts, torch's among them, would inherit its one processor.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from ctypes import c_int64, c_void_p
from pathlib import Path

from qwenkit.errors import KernelError
from qwenkit.kernels.cpu.library import kernel

_TOPOLOGY = Path("/sys/devices/system/cpu")


class _PlaceThreads(ctypes.Structure):
    _fields_ = (("processors", c_void_p), ("count", c_int64), ("one_each", c_int64))


def place_helpers(library: ctypes.CDLL, *, pin: bool) -> None:
    """Bind each helper of the library's pool, those to come included, to a processor of its own;
    or let them work on any that the process may use. Raises KernelError where that cannot be done.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise KernelError("pin_threads: this operating system does not let threads be pinned.")
    first, *others = whole_cores_first(os.sched_getaffinity(0), _TOPOLOGY)
    order = [*others, first]  # the first is left to the caller
    numbers = (c_int64 * len(order))(*order)
    call = kernel(library, "qk_place_threads", _PlaceThreads)
    if call(_PlaceThreads(ctypes.addressof(numbers), len(order), int(pin))):
        raise KernelError(f"pin_threads: the operating system refuses the processors {order}.")


def whole_cores_first(processors: Iterable[int], topology: Path) -> list[int]:
    """Processors in the order to use them: one of each core, then the cores' second halves."""
    halves: dict[str, list[int]] = {}
    for processor in sorted(processors):
        try:
            siblings = topology / f"cpu{processor}" / "topology" / "thread_siblings_list"
            core = siblings.read_text().strip()
        except OSError:
            core = str(processor)
        halves.setdefault(core, []).append(processor)
    ranked = [(rank, p) for core in halves.values() for rank, p in enumerate(core)]
    return [processor for _, processor in sorted(ranked)]
