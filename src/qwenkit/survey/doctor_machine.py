"""What this machine offers, and what of it is used: processor, kernels, threads, memory, versions.

Reads Linux's own files where there are any; elsewhere the figures are left out.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwenkit.kernels import devices
from qwenkit.kernels.cpu import KernelInfo, kernel_info
from qwenkit.kernels.devices import Device

_PACKAGES = ("qwenkit", "torch", "numpy", "tiktoken", "jinja2", "huggingface-hub", "transformers")
_CPU_INFO, _MEMORY_INFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class Machine:
    """`memory_bytes` is what the process may have at most, `free_bytes` what is free of it.

    `versions` is by package, None where it is not installed. `devices` are the processor
    and the accelerators that torch finds.
    """

    system: str
    python: str
    versions: Mapping[str, str | None]
    processor: str
    cores: int
    kernels: KernelInfo
    memory_bytes: int | None
    free_bytes: int | None
    devices: tuple[Device, ...]


def examine_machine() -> Machine:
    """Look at the machine; builds the native kernels if they are not there yet."""
    total, free = machine_memory()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: _version(name) for name in _PACKAGES},
        processor=_processor(),
        cores=_cores(),
        kernels=kernel_info(),
        memory_bytes=total,
        free_bytes=free,
        devices=(devices.find_cpu(), *devices.find_accelerators()),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    named = re.search(r"^model name\s*: (.+)$", _text(_CPU_INFO), re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def _cores() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_memory() -> tuple[int | None, int | None]:
    """(All, free) bytes of memory, within the limit of the container if there is one."""
    text = _text(_MEMORY_INFO)
    total, free = (
        int(found[1]) * 1024 if found else None
        for found in (re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE) for key in _KEYS)
    )
    limit = _text(_MEMORY_LIMIT).strip()
    if total is not None and limit.isdecimal():
        total = min(total, int(limit))
        free = None if free is None else min(free, total)
    return total, free


_KEYS = ("MemTotal", "MemAvailable")


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
