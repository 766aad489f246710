"""Compiles the native kernels on first use and keeps the libraries in the user's cache.

One library per instruction set, all of the same sources and with the same C functions, so that a
machine compiles and loads only what it can run. A library's place is a hash of the sources, the
flags and the compiler: changing any of them builds anew, and nothing is ever overwritten with
something else. Knows no op.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from qwenkit.errors import KernelError, suggest

_log = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent / "cpu"
KERNEL_CHOICES = ("auto", "native", "reference")
KernelChoice = Literal["auto", "native", "reference"]

_BUILD_TIMEOUT_S = 300.0
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",  # whether a product and a sum are fused is written, never chosen
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One instruction set: the compiler's flags, and the CPU features that it needs."""

    name: str
    flags: tuple[str, ...] = ()
    features: frozenset[str] = frozenset()


_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}

# From the fastest to the one that runs everywhere. On ARM "plain" has NEON, which is always there.
VARIANTS = (
    Variant("avx512", tuple(f"-m{f}" for f in sorted(_AVX512)), _AVX512),
    Variant("avx2", tuple(f"-m{f}" for f in sorted(_AVX2)), _AVX2),
    Variant("plain"),
)


def kernel_choice() -> KernelChoice:
    """What QWENKIT_KERNELS asks for: "auto" (unset), "native" or "reference".

    Raises KernelError for anything else.
    """
    choice = os.environ.get("QWENKIT_KERNELS") or "auto"
    if choice not in KERNEL_CHOICES:
        raise KernelError(f"QWENKIT_KERNELS={choice!r}: {suggest(choice, KERNEL_CHOICES)}")
    return cast(KernelChoice, choice)


def usable_variants(features: frozenset[str]) -> tuple[Variant, ...]:
    """Those that a CPU with these features runs, the fastest first."""
    return tuple(v for v in VARIANTS if v.features <= features)


def build_variant(variant: Variant, *, extra_flags: Sequence[str] = ()) -> Path:
    """The library of all ops for one instruction set, compiled unless the cache has it.

    Raises KernelError when there is no compiler, it fails, or the cache cannot be written.
    """
    sources = sorted(p for p in SOURCE_FOLDER.glob("*.cpp") if p.name != "features.cpp")
    return _build(variant.name, sources, (*variant.flags, *extra_flags))


def build_probe() -> Path:
    """The small library that says which features the CPU has. Raises as `build_variant` does."""
    return _build("features", [SOURCE_FOLDER / "features.cpp"], ())


def _build(name: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    compiler = _find_compiler()
    command = [*compiler, *_FLAGS, *flags]
    folder = _cache_folder() / _key(command, _compiler_version(compiler))
    library = folder / f"{name}.so"
    if library.exists():
        return library
    _log.info("Compiling the native kernels (%s), once, into %s", name, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as workplace:
            fresh = Path(workplace) / library.name
            _compile([*command, *map(str, sources), "-o", str(fresh), "-ldl"], cwd=workplace)
            fresh.replace(library)  # in one step: another process sees all of it or nothing
    except OSError as error:
        raise KernelError(
            f"The native kernels cannot be kept in {folder}: {error}. Make that folder writable, "
            "or set XDG_CACHE_HOME to one that is."
        ) from error
    return library


def _compile(command: Sequence[str], *, cwd: str) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_BUILD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise KernelError(
            f"Compiling the native kernels with {command[0]!r} took more than "
            f"{_BUILD_TIMEOUT_S:.0f} s and was stopped."
        ) from error
    if done.returncode:
        output = done.stdout.decode(errors="replace").strip()
        raise KernelError(
            f"Compiling the native kernels failed with status {done.returncode}: "
            f"{shlex.join(command)}\n{output[-2000:]}"
        )


def _find_compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for candidate in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        program = shutil.which(candidate[0])
        if program:
            return [program, *candidate[1:]]
    looked_for = shlex.join(named) + " (from CXX)" if named else "c++, g++ or clang++"
    raise KernelError(
        f"No C++ compiler found (looked for {looked_for}). Install g++ (Debian: apt install g++) "
        "or clang, or name one in CXX."
    )


def _compiler_version(compiler: Sequence[str]) -> bytes:
    try:
        done = subprocess.run(
            [*compiler, "--version"], capture_output=True, stdin=subprocess.DEVNULL, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"The C++ compiler {compiler[0]!r} cannot be run: {error}") from error
    return done.stdout


def _key(command: Sequence[str], compiler_version: bytes) -> str:
    digest = hashlib.sha256("\0".join(command).encode() + b"\0" + compiler_version)
    for path in sorted(SOURCE_FOLDER.glob("*.[ch]*")):
        digest.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(root) if root else Path.home() / ".cache"
    except RuntimeError as error:  # a user without an entry and without HOME
        raise KernelError(
            f"No place for the native kernels: {error} Set XDG_CACHE_HOME."
        ) from error
    return base / "qwenkit" / "kernels"
