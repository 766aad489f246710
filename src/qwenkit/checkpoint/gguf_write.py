"""Writing of GGUF files, version 3, in one pass and atomically.

The header needs every name, shape and type before the first byte of data, but the data themselves
can be made when their turn comes: only one tensor is in memory at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from qwenkit.checkpoint.atomic import replacing
from qwenkit.checkpoint.gguf import (
    ARRAY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DIMENSIONS,
    MIN_ALIGNMENT,
    SCALARS,
    STRING,
)
from qwenkit.checkpoint.safetensors_write import tensor_bytes
from qwenkit.checkpoint.storages import GGML_NUMBERS, read_dtype, size_bytes
from qwenkit.errors import UsageError, suggest

Scalar = bool | int | float | str
Value = Scalar | Sequence[Scalar]
TypedValue = tuple[str, Value]
Data = bytes | bytearray | memoryview | torch.Tensor
Made = Data | Callable[[], Data | Iterator[Data]]
TensorEntry = tuple[str, Sequence[int], str, Made]

TYPES: Mapping[str, int] = {
    "u8": 0,
    "i8": 1,
    "u16": 2,
    "i16": 3,
    "u32": 4,
    "i32": 5,
    "f32": 6,
    "bool": 7,
    "str": STRING,
    "u64": 10,
    "i64": 11,
    "f64": 12,
}
_RANGES = {name: range(0, 2 ** int(name[1:])) for name in ("u8", "u16", "u32", "u64")} | {
    name: range(-(2 ** (int(name[1:]) - 1)), 2 ** (int(name[1:]) - 1))
    for name in ("i8", "i16", "i32", "i64")
}


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value | TypedValue],
    tensors: Iterable[TensorEntry],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
) -> None:
    """Write the file `path`.

    `metadata`: a whole number becomes u32, or i32, u64, i64 where it does not fit; a list of whole
    numbers i32 if it can; a float f32; text and flags themselves. `("f64", 0.1)` or
    `("u8", [1, 2])` says the type outright, and must for an empty list. `general.alignment` is
    written as `alignment` needs it.

    `tensors`: (name, shape, storage, data). `shape` is the logical shape, outermost first, and
    `storage` a tag as in `StoredTensor`. `data` are the bytes, or a tensor as `StoredTensor.read`
    returns it, or a function that makes either when its turn comes, or makes it piece by piece.

    Raises UsageError for what the format has no place for, CheckpointError when the disk refuses.
    """
    if alignment not in [2**n for n in range(3, 17)]:
        allowed = f"a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT:,}"
        raise UsageError(f"alignment: got {alignment!r}; expected {allowed}.")
    values = {key: value for key, value in metadata.items() if key != "general.alignment"}
    if "" in values:
        raise UsageError("metadata: a key is empty.")
    if alignment != DEFAULT_ALIGNMENT:
        values["general.alignment"] = ("u32", alignment)
    entries = [_Entry.of(*tensor) for tensor in tensors]
    if len({entry.name for entry in entries}) < len(entries):
        raise UsageError("tensors: a name is there twice.")
    header = bytearray(MAGIC + struct.pack("<IQQ", 3, len(entries), len(values)))
    for key, value in values.items():
        header += _text(key) + _typed(key, value)
    offset = 0
    for entry in entries:
        header += entry.header(offset)
        offset += _padded(entry.size_bytes, alignment)
    header += bytes(_padded(len(header), alignment) - len(header))
    with replacing(path) as output:
        output.write(header)
        for entry in entries:
            entry.write(output)
            output.write(bytes(_padded(entry.size_bytes, alignment) - entry.size_bytes))


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    storage: str
    data: Made
    size_bytes: int

    @classmethod
    def of(cls, name: str, shape: Sequence[int], storage: str, data: Made) -> _Entry:
        if not name:
            raise UsageError("tensors: a name is empty.")
        if storage not in GGML_NUMBERS:
            raise UsageError(
                f"{name}: GGUF has no type {storage!r}. {suggest(storage, GGML_NUMBERS)}"
            )
        if len(shape) > MAX_DIMENSIONS or any(d < 1 for d in shape):
            raise UsageError(
                f"{name}: got the shape {list(shape)}; GGUF takes up to {MAX_DIMENSIONS} "
                "dimensions of at least 1."
            )
        try:
            size = size_bytes(storage, tuple(shape))
        except ValueError as error:
            raise UsageError(f"{name}: {error}.") from error
        return cls(name, tuple(shape), storage, data, size)

    def header(self, offset: int) -> bytes:
        """This tensor's row of the table; its data start `offset` bytes into the data."""
        shape = struct.pack(f"<I{len(self.shape)}Q", len(self.shape), *reversed(self.shape))
        return _text(self.name) + shape + struct.pack("<IQ", GGML_NUMBERS[self.storage], offset)

    def write(self, output: BinaryIO) -> None:
        made = self.data() if callable(self.data) else self.data
        given = 0
        for piece in made if isinstance(made, Iterator) else [made]:
            if isinstance(piece, torch.Tensor):
                if piece.dtype != read_dtype(self.storage):
                    wanted = read_dtype(self.storage)
                    raise UsageError(
                        f"{self.name}: {self.storage} needs {wanted}, got {piece.dtype}."
                    )
                piece = tensor_bytes(piece)
            given += memoryview(piece).nbytes
            output.write(piece)
        if given != self.size_bytes:
            raise UsageError(
                f"{self.name}: {self.storage} {list(self.shape)} needs {self.size_bytes} bytes, "
                f"got {given}."
            )


def _typed(key: str, value: Value | TypedValue) -> bytes:
    """A metadata value with its type in front."""
    kind, plain = _kind(key, value)
    if kind not in TYPES:
        raise UsageError(f"{key}: GGUF has no type {kind!r}. {suggest(str(kind), TYPES)}")
    if isinstance(plain, str | bool | int | float):
        return struct.pack("<I", TYPES[kind]) + _items(key, kind, [plain])
    items = list(plain)
    start = struct.pack("<IIQ", ARRAY, TYPES[kind], len(items))
    return start + _items(key, kind, items)


def _kind(key: str, value: Value | TypedValue) -> tuple[str, Value]:
    """The type's name and the value, the type chosen where it was not said."""
    if isinstance(value, tuple):
        if len(value) == 2 and value[0] in TYPES and not isinstance(value[1], tuple):
            return str(value[0]), value[1]
        raise UsageError(f"{key}: got the tuple {value!r}; expected (type, value) or a list.")
    items = list(value) if isinstance(value, list) else [value]
    if not items:
        raise UsageError(f"{key}: an empty list needs its type, such as ('str', []).")
    kinds = {type(item) for item in items}
    if len(kinds) > 1 or not kinds <= {bool, int, float, str}:
        raise UsageError(f"{key}: got {sorted(k.__name__ for k in kinds)}; GGUF takes one kind.")
    kind = kinds.pop()
    if kind is not int:
        return {bool: "bool", float: "f32", str: "str"}[kind], value
    order = (
        ("i32", "u32", "i64", "u64") if isinstance(value, list) else ("u32", "i32", "u64", "i64")
    )
    for name in order:
        if all(item in _RANGES[name] for item in items):
            return name, value
    raise UsageError(f"{key}: a whole number needs over 64 bits.")


def _items(key: str, kind: str, items: Sequence[object]) -> bytes:
    if kind == "str":
        if not all(isinstance(item, str) for item in items):
            raise UsageError(f"{key}: expected text.")
        return b"".join(_text(str(item)) for item in items)
    if kind == "bool" and not all(isinstance(item, bool) for item in items):
        raise UsageError(f"{key}: expected true or false.")
    layout = f"<{len(items)}{SCALARS[TYPES[kind]]}"
    try:
        return struct.pack(layout, *items)
    except (struct.error, OverflowError) as error:
        raise UsageError(f"{key}: does not fit into {kind}: {error}.") from error


def _text(text: str) -> bytes:
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{text!r} is not Unicode.") from error
    return struct.pack("<Q", len(encoded)) + encoded


def _padded(size: int, alignment: int) -> int:
    return (size + alignment - 1) // alignment * alignment
