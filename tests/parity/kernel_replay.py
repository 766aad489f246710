"""Records what the native kernels are called with over the cases of every op, for a program without
Python (`kernel_replay.cpp`) to repeat: under sanitizers, and on other processors.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import pkgutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import qwenkit.kernels.cpu
from qwenkit.kernels import build
from qwenkit.kernels.cpu import bind, bind_packed, library
from qwenkit.kernels.registry import OPS

DRIVER = Path(__file__).with_suffix(".cpp")
THREADS = (1, 2)
_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.int8: 4}


@dataclass
class _Buffer:
    """The memory of one tensor storage, and its bytes before the case, before and after the last
    call.
    """

    address: int
    size: int
    kind: int
    owner: torch.UntypedStorage
    first: bytes
    before: bytes = b""
    after: bytes = b""


@dataclass
class _Call:
    name: str
    arguments: bytes
    status: int
    pointers: list[tuple[int, int, int]]  # (offset of the field, buffer or -1, offset in it)


@dataclass
class _Case:
    label: str
    tolerance: float
    buffers: list[_Buffer] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)


def _bytes(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size) if size else b""


def _storages() -> Iterator[tuple[torch.UntypedStorage, torch.dtype]]:
    for thing in gc.get_objects():
        # isinstance asks some objects for their __class__, which may do anything.
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            yield thing.untyped_storage(), thing.dtype


def _pointers(kind: Any, start: int = 0) -> Iterator[int]:
    """Where in a structure's bytes there are addresses, in what it contains as well."""
    if kind is ctypes.c_void_p:
        yield start
    elif issubclass(kind, ctypes.Array):
        for i in range(kind._length_):
            yield from _pointers(kind._type_, start + i * ctypes.sizeof(kind._type_))
    elif issubclass(kind, ctypes.Structure):
        for name, inner, *_ in kind._fields_:
            yield from _pointers(inner, start + getattr(kind, name).offset)


class _Recorder:
    """Stands between the bindings and the library."""

    def __init__(self) -> None:
        self.cases: list[_Case] = []

    def kernel(
        self, opened: ctypes.CDLL, name: str, arguments: type[ctypes.Structure]
    ) -> Callable[[ctypes.Structure], int]:
        call = self.original(opened, name, arguments)
        pointers = list(_pointers(arguments))

        def run(given: ctypes.Structure) -> int:
            case = self.cases[-1]
            values = [ctypes.c_void_p.from_buffer(given, offset).value for offset in pointers]
            found = [
                (offset, *self._find(case, value or 0))
                for offset, value in zip(pointers, values, strict=True)
            ]
            used = [case.buffers[index] for _, index, _ in found if index >= 0]
            for buffer in used:
                buffer.before = _bytes(buffer.address, buffer.size)
            status: int = call(given)
            for buffer in case.buffers:
                buffer.after = _bytes(buffer.address, buffer.size) if buffer in used else b""
            case.calls.append(_Call(name, bytes(given), status, found))
            return status

        return run

    original: Any = staticmethod(library.kernel)

    def _find(self, case: _Case, pointer: int) -> tuple[int, int]:
        """The buffer that a pointer leads into, and where in it."""
        if pointer == 0:
            return -1, 0
        for index, buffer in enumerate(case.buffers):
            if buffer.address <= pointer < buffer.address + max(1, buffer.size):
                return index, pointer - buffer.address
        for storage, dtype in _storages():
            start, size = storage.data_ptr(), storage.nbytes()
            if start <= pointer < start + size:
                kind = _KINDS.get(dtype, 0)
                case.buffers.append(_Buffer(start, size, kind, storage, first=_bytes(start, size)))
                return len(case.buffers) - 1, pointer - start
        raise AssertionError(f"{case.label}: a pointer leads into no tensor")


@contextmanager
def _recording() -> Iterator[_Recorder]:
    """Bindings made inside the block tell what they call."""
    recorder = _Recorder()
    names = [m.name for m in pkgutil.iter_modules(qwenkit.kernels.cpu.__path__)]
    modules = [importlib.import_module(f"qwenkit.kernels.cpu.{name}") for name in names]
    patched = [m for m in modules if getattr(m, "kernel", None) is library.kernel]
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    for module in patched:
        module.kernel = recorder.kernel  # type: ignore[attr-defined]
    for table in (bind_packed._steps, bind_packed._levels):
        table.cache_clear()  # made again, so that they are found
    torch.use_deterministic_algorithms(True)  # new memory is NaN, so that what is written shows
    gc.collect()
    gc.freeze()  # what is there already is no case's
    try:
        yield recorder
    finally:
        gc.unfreeze()
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)
        for module in patched:
            module.kernel = recorder.original  # type: ignore[attr-defined]


def record(variant: build.Variant, file: Path) -> int:
    """Write every case of every op, as this machine's library of `variant` computes it; returns
    the number of cases.
    """
    with _recording() as recorder:
        for name, run in bind.load_kernels(build.build_variant(variant)).items():
            importlib.import_module(f"qwenkit.kernels.ops.{name}")
            op = OPS[name]
            for index, arguments in enumerate(op.cases()):
                for threads in THREADS:
                    torch.set_num_threads(threads)
                    label = f"{name}, case {index}, {threads} threads"
                    recorder.cases.append(_Case(label, op.bound(arguments)))
                    run(*map(_alone, arguments))
    cases = [case for case in recorder.cases if case.calls]  # others were the reference's
    with file.open("wb") as out:
        out.write(struct.pack("<I", len(cases)))
        for case in cases:
            out.write(_encode(case))
    return len(cases)


def _alone(value: Any) -> Any:
    """Tensors in memory of their own, as long as they are; strides are kept."""
    if isinstance(value, list):
        return [_alone(each) for each in value]
    if not isinstance(value, torch.Tensor) or not all(value.stride()):
        return value
    fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return fresh.copy_(value)


def _encode(case: _Case) -> bytes:
    parts = [_text(case.label.encode()), struct.pack("<dI", case.tolerance, len(case.buffers))]
    last = {index for _, index, _ in case.calls[-1].pointers}
    for index, buffer in enumerate(case.buffers):
        # What an earlier call made for the last one may be laid out otherwise elsewhere.
        checked = index in last and (buffer.before != buffer.after or buffer.first == buffer.before)
        parts += [struct.pack("<QB", buffer.size, buffer.kind), buffer.first]
        parts += [bytes([checked]), buffer.after if checked else b""]
    parts.append(struct.pack("<I", len(case.calls)))
    for call in case.calls:
        parts += [_text(call.name.encode()), _text(call.arguments)]
        parts.append(struct.pack("<iI", call.status, len(call.pointers)))
        parts += [struct.pack("<IiQ", *pointer) for pointer in call.pointers]
    return b"".join(parts)


def _text(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value


def build_driver(
    compiler: list[str], variant: build.Variant, output: Path, *extra_flags: str
) -> Path:
    """The program that repeats recorded calls, linked with the kernels of `variant`."""
    sources = [*build.op_sources(), build.SOURCE_FOLDER / "features.cpp", DRIVER]
    flags = (*build.FLAGS, *variant.flags, "-rdynamic", *extra_flags)
    build.compile_and_link(compiler, flags, sources, output)
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=[v.name for v in build.VARIANTS])
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    record(next(v for v in build.VARIANTS if v.name == given.variant), given.file)
