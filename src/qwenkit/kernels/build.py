"""Finds the native kernels: carried by the package, kept in the user's cache, or compiled now.

One library per instruction set, all of the same sources and with the same C functions, so that a
machine compiles and loads only what it can run. A library's name or place holds a hash of what it
was made of (sources, flags and, in the cache, the compiler): changing any of them builds anew, and
nothing is ever overwritten with something else. A wheel carries every library of its platform
(`setup.py` calls `prebuild`); a source checkout compiles on first use. Knows no op.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from qwenkit.errors import KernelError, suggest

_log = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent / "cpu"
PREBUILT = "prebuilt"  # below SOURCE_FOLDER: the libraries that a wheel carries
KERNEL_CHOICES = ("auto", "native", "reference")
KernelChoice = Literal["auto", "native", "reference"]

_BUILD_TIMEOUT_S = 300.0
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",  # whether a product and a sum are fused is written, never chosen
)
_PROBE = "features"


@dataclass(frozen=True, slots=True)
class Variant:
    """One instruction set: the compiler's flags, and the CPU features that it needs.

    `machine` is the processor family that it is for, "x86_64" or "aarch64"; None is any.
    """

    name: str
    flags: tuple[str, ...] = ()
    features: frozenset[str] = frozenset()
    machine: str | None = None


_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


def _x86(name: str, features: frozenset[str]) -> Variant:
    """A variant whose compiler flags are the features' names, written a little differently."""
    spelt = {f: f.replace("_", "-" if f.startswith("amx") else "") for f in sorted(features)}
    return Variant(name, tuple(f"-m{flag}" for flag in spelt.values()), features, "x86_64")


# From the fastest to the one that runs everywhere. On ARM "plain" has NEON, which is always there.
VARIANTS = (
    _x86("amx", _AVX512 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}),
    _x86("avx512_bf16", _AVX512 | {"avx512_vnni", "avx512_bf16"}),
    _x86("avx512_vnni", _AVX512 | {"avx512_vnni"}),
    _x86("avx512", _AVX512),
    _x86("avx_vnni", _AVX2 | {"avx_vnni"}),
    _x86("avx2", _AVX2),
    Variant("neon_dotprod", ("-march=armv8.2-a+dotprod",), frozenset({"asimddp"}), "aarch64"),
    Variant("plain", ("-O2",)),  # at -O3 the products alone take a minute and a gigabyte
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


def machine_variants(machine: str) -> tuple[Variant, ...]:
    """Those of a processor family, by any of the names that operating systems have for it."""
    family = {"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return tuple(v for v in VARIANTS if v.machine in (None, family))


def build_best(features: frozenset[str]) -> tuple[Variant, Path]:
    """The fastest variant that a CPU with these features runs and the compiler knows; its library.

    Raises as `build_variant` does.
    """
    *better, last = usable_variants(features)
    for variant in better:
        if _carried(variant.name, variant.flags) or _knows(find_compiler(), variant.flags):
            return variant, build_variant(variant)
        _log.info("The compiler is too old for the variant %s of the kernels", variant.name)
    return last, build_variant(last)


def build_variant(variant: Variant, *, extra_flags: Sequence[str] = ()) -> Path:
    """The library of all ops for one instruction set, compiled unless package or cache has it.

    Raises KernelError when there is no compiler, it fails, or the cache cannot be written.
    """
    return _build(variant.name, op_sources(), (*variant.flags, *extra_flags))


def build_probe() -> Path:
    """The small library that says which features the CPU has. Raises as `build_variant` does."""
    return _build(_PROBE, _probe_sources(), ())


def prebuild(folder: Path) -> list[Path]:
    """Compile every library of this machine and put it into `folder`, named for a package to carry
    them; what the user's cache has of them is taken from there.

    A variant that the compiler is too old for is left out. Raises KernelError when there is no
    compiler or it fails.
    """
    compiler = find_compiler()
    wanted: list[tuple[str, Sequence[Path], tuple[str, ...]]] = [(_PROBE, _probe_sources(), ())]
    for variant in machine_variants(platform.machine()):
        if _knows(compiler, variant.flags):
            wanted.append((variant.name, op_sources(), variant.flags))
        else:
            _log.warning("The compiler is too old for the variant %s: left out", variant.name)
    folder.mkdir(parents=True, exist_ok=True)
    libraries = []
    for name, sources, flags in wanted:
        libraries.append(folder / _carried_name(name, flags))
        kept = _cache_folder() / _key(flags, compiler) / f"{name}.so"
        if kept.is_file():
            shutil.copyfile(kept, libraries[-1])
        else:
            compile_and_link(compiler, (*FLAGS, *flags, "-shared"), sources, libraries[-1])
    return libraries


def op_sources() -> list[Path]:
    """The C++ files of all ops and of what they share."""
    return sorted(p for p in SOURCE_FOLDER.glob("*.cpp") if p.stem != _PROBE)


def _probe_sources() -> list[Path]:
    return [SOURCE_FOLDER / f"{_PROBE}.cpp"]


def _build(name: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    if carried := _carried(name, flags):
        return carried
    compiler = find_compiler()
    folder = _cache_folder() / _key(flags, compiler)
    library = folder / f"{name}.so"
    if library.exists():
        return library
    _log.info("Compiling the native kernels (%s), once, into %s", name, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as workplace:
            fresh = Path(workplace) / library.name
            compile_and_link(compiler, (*FLAGS, *flags, "-shared"), sources, fresh)
            fresh.replace(library)  # in one step: another process sees all of it or nothing
    except OSError as error:
        raise KernelError(
            f"The native kernels cannot be kept in {folder}: {error}. Make that folder writable, "
            "or set XDG_CACHE_HOME to one that is."
        ) from error
    return library


def compile_and_link(
    compiler: Sequence[str], flags: Sequence[str], sources: Sequence[Path], output: Path
) -> None:
    """Compile `sources`, as many at once as there are processors, and link them into `output`.

    Raises KernelError with what the compiler said; OSError when files cannot be written.
    """
    output = output.absolute()
    with tempfile.TemporaryDirectory(prefix=".objects-", dir=output.parent) as workplace:
        objects = [str(Path(workplace) / f"{i}-{s.stem}.o") for i, s in enumerate(sources)]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as workers:
            jobs = [
                workers.submit(_run, [*compiler, *flags, "-c", str(source), "-o", to], workplace)
                for source, to in zip(sources, objects, strict=True)
            ]
            for job in jobs:
                job.result()
        _run([*compiler, *flags, *objects, "-o", str(output), "-ldl"], workplace)


def _run(command: Sequence[str], cwd: str) -> None:
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


def find_compiler() -> list[str]:
    """The C++ compiler's command: CXX, else the first one there is. Raises KernelError."""
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


def _knows(compiler: Sequence[str], flags: Sequence[str]) -> bool:
    """Whether the compiler takes these flags, asked with an empty source."""
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _cannot_run(compiler, error) from error
    return done.returncode == 0


def _compiler_version(compiler: Sequence[str]) -> bytes:
    try:
        done = subprocess.run(
            [*compiler, "--version"], capture_output=True, stdin=subprocess.DEVNULL, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _cannot_run(compiler, error) from error
    return done.stdout


def _cannot_run(compiler: Sequence[str], error: Exception) -> KernelError:
    return KernelError(f"The C++ compiler {compiler[0]!r} cannot be run: {error}")


def _carried(name: str, flags: Sequence[str]) -> Path | None:
    """The package's own library, if it has one of exactly these sources and flags."""
    folder = SOURCE_FOLDER / PREBUILT
    if not folder.is_dir():
        return None
    library = folder / _carried_name(name, flags)
    return library if library.is_file() else None


def _carried_name(name: str, flags: Sequence[str]) -> str:
    return f"{name}-{_recipe(flags).hexdigest()[:20]}.so"


def _key(flags: Sequence[str], compiler: Sequence[str]) -> str:
    digest = _recipe(flags)
    digest.update("\0".join(compiler).encode() + b"\0" + _compiler_version(compiler))
    return digest.hexdigest()[:20]


def _recipe(flags: Sequence[str]) -> hashlib._Hash:
    """A hash of what a library is made of, whatever compiles it."""
    digest = hashlib.sha256("\0".join((platform.machine(), *FLAGS, *flags)).encode())
    for path in sorted(SOURCE_FOLDER.glob("*.[ch]*")):
        digest.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    return digest


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(root) if root else Path.home() / ".cache"
    except RuntimeError as error:  # a user without an entry and without HOME
        raise KernelError(
            f"No place for the native kernels: {error} Set XDG_CACHE_HOME."
        ) from error
    return base / "qwenkit" / "kernels"
