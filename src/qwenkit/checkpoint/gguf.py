"""Reading of GGUF files, versions 2 and 3, by the format's published description (gguf.md).

A file is: magic, version, two counts; metadata (key, type, value); tensor table (name, dimensions,
type, offset); padding; data. Everything is little-endian. Nothing in the file is believed: every
count is held against the bytes that are left before anything is made of it. No tensor data is
touched. This module knows no model: see `gguf_model` for what the metadata mean.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qwenkit.checkpoint.mapping import MappedFile
from qwenkit.checkpoint.members import clip, refuse_lfs_pointer
from qwenkit.checkpoint.spec import StoredTensor
from qwenkit.checkpoint.storages import GGML_TAGS, GGML_UNREAD, size_bytes
from qwenkit.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 65_536
MAX_DIMENSIONS = 4
MAX_BYTES = 2**63 - 1
MAX_ENTRIES = 65_536  # metadata keys, and tensors; the largest published files have some thousands
MAX_NAME_BYTES = 65_535
MAX_ARRAY_ITEMS = 2_097_152  # of all arrays of a file together: seven times a Qwen vocabulary
MAX_ARRAY_DEPTH = 4
_MIN_KEY_BYTES = 14  # length 8, one character, type 4, value 1
_MIN_TENSOR_BYTES = 25  # length 8, one character, dimensions 4, type 4, offset 8

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

SCALARS: Mapping[int, str] = {  # GGUF's number of a value type → the letter of the struct module
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
FLOAT32, BOOL, STRING, ARRAY = 6, 7, 8, 9


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a GGUF says: metadata as Python values, tensors as memory-mapped views, by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def read_gguf(file: Path) -> GgufFile:
    """Read the header of a GGUF. Raises CheckpointError naming the file and the field."""
    refuse_lfs_pointer(file)
    mapped = MappedFile(file)
    cursor = _Cursor(mapped)
    _check_start(cursor)
    tensor_count = _count(cursor, "tensor count", _MIN_TENSOR_BYTES)
    key_count = _count(cursor, "metadata count", _MIN_KEY_BYTES)
    metadata = _metadata(cursor, key_count)
    alignment = _alignment(file, metadata)
    splits = metadata.get("split.count", 0)
    if isinstance(splits, int) and splits > 1:
        raise CheckpointError(
            file, "split.count", f"is one of {splits} parts; join them with llama-gguf-split."
        )
    entries = _tensor_table(cursor, tensor_count)
    data_start = _round_up(cursor.at, alignment)
    return GgufFile(metadata, _lay_out(mapped, entries, data_start, alignment))


_CUT_SHORT = "it was probably cut short, fetch it again"


class _Cursor:
    """Reads the header from front to back; `at` is the place of the next byte."""

    def __init__(self, mapped: MappedFile) -> None:
        self.file = mapped.file
        self.buffer = memoryview(mapped.buffer)
        self.end = mapped.size_bytes
        self.at = 0
        self.items_left = MAX_ARRAY_ITEMS

    def take(self, count: int, field: str) -> int:
        """Step over `count` bytes; returns where they start."""
        start = self.at
        if count > self.end - start:
            raise self.error(
                field,
                f"needs {count:,} bytes at {start:,}, the file ends at {self.end:,}; {_CUT_SHORT}",
            )
        self.at = start + count
        return start

    def number(self, layout: struct.Struct, field: str) -> int:
        value: int = layout.unpack_from(self.buffer, self.take(layout.size, field))[0]
        return value

    def text(self, field: str, *, most: int | None = None) -> str:
        length = self.number(_U64, field)
        if most is not None and not 1 <= length <= most:
            raise self.error(field, f"has {length:,} bytes; allowed: 1 to {most:,}")
        start = self.take(length, field)
        try:
            return str(self.buffer[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(field, f"is not UTF-8 at byte {start + error.start:,}") from error

    def error(self, field: str, message: str) -> CheckpointError:
        return CheckpointError(self.file, field, f"{message}.")


def _check_start(cursor: _Cursor) -> None:
    start = cursor.take(4, "magic")
    magic = bytes(cursor.buffer[start : start + 4])
    if magic != MAGIC:
        raise cursor.error("magic", f"expected {MAGIC!r}, found {magic!r}; this is no GGUF file")
    version = cursor.number(_U32, "version")
    if version not in VERSIONS:
        if int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS:
            raise cursor.error("version", "is big-endian, which is not supported")
        raise cursor.error("version", f"got {version}; supported: 2 and 3")


def _count(cursor: _Cursor, field: str, min_bytes: int) -> int:
    count = cursor.number(_U64, field)
    room = (cursor.end - cursor.at) // min_bytes
    if count > MAX_ENTRIES:
        raise cursor.error(field, f"{count:,}; at most {MAX_ENTRIES:,} are read")
    if count > room:
        raise cursor.error(field, f"{count:,}, but the file has room for {room:,}; {_CUT_SHORT}")
    return count


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for number in range(count):
        key = cursor.text(f"metadata key {number}", most=MAX_NAME_BYTES)
        if key in metadata:
            raise cursor.error(clip(key), "is there twice")
        kind = cursor.number(_U32, clip(key))
        metadata[key] = _value(cursor, kind, clip(key), depth=0)
    return metadata


def _value(cursor: _Cursor, kind: int, field: str, *, depth: int) -> Any:
    if kind == STRING:
        return cursor.text(field)
    if kind == ARRAY:
        return _array(cursor, field, depth=depth)
    if kind not in SCALARS:
        raise cursor.error(field, f"has the unknown value type {kind}")
    value = _scalars(cursor, kind, 1, field)[0]
    return _shortest(value) if kind == FLOAT32 else value


def _array(cursor: _Cursor, field: str, *, depth: int) -> list[Any]:
    kind, count = cursor.number(_U32, field), cursor.number(_U64, field)
    if kind not in SCALARS and kind not in (STRING, ARRAY):
        raise cursor.error(field, f"has the unknown item type {kind}")
    least = struct.calcsize(SCALARS[kind]) if kind in SCALARS else 8 if kind == STRING else 12
    room = (cursor.end - cursor.at) // least
    if count > cursor.items_left:
        raise cursor.error(
            field, f"has {count:,} items; at most {MAX_ARRAY_ITEMS:,} in all arrays are read"
        )
    if count > room:
        raise cursor.error(
            field, f"has {count:,} items, but the file has room for {room:,}; {_CUT_SHORT}"
        )
    cursor.items_left -= count
    if kind == STRING:
        return _strings(cursor, count, field)
    if kind == ARRAY:
        if depth + 1 >= MAX_ARRAY_DEPTH:
            raise cursor.error(field, f"has arrays over {MAX_ARRAY_DEPTH} deep")
        return [_array(cursor, field, depth=depth + 1) for _ in range(count)]
    return list(_scalars(cursor, kind, count, field))


def _scalars(cursor: _Cursor, kind: int, count: int, field: str) -> tuple[Any, ...]:
    layout = f"<{count}{SCALARS[kind]}"
    start = cursor.take(struct.calcsize(layout), field)
    values = struct.unpack_from(layout, cursor.buffer, start)
    if kind != BOOL:
        return values
    if values and max(values) > 1:
        raise cursor.error(field, f"has the byte {max(values)}, which is neither true nor false")
    return tuple(v == 1 for v in values)


def _strings(cursor: _Cursor, count: int, field: str) -> list[str]:
    """The loop that a vocabulary of 150,000 tokens goes through: `text` without its calls."""
    buffer, at, end = cursor.buffer, cursor.at, cursor.end
    unpack = _U64.unpack_from
    strings: list[str] = []
    append = strings.append
    try:
        for _ in range(count):
            start = at + 8
            at = start + unpack(buffer, at)[0]
            if at > end:
                break
            append(str(buffer[start:at], "utf-8"))
    except struct.error:
        at = end + 1
    except UnicodeDecodeError as error:
        raise cursor.error(f"{field}[{len(strings)}]", "is not UTF-8") from error
    if at > end:
        raise cursor.error(f"{field}[{len(strings)}]", f"goes past the end at {end:,}")
    cursor.at = at
    return strings


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _alignment(file: Path, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if (
        isinstance(alignment, bool)
        or not isinstance(alignment, int)
        or not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        allowed = f"a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT:,}"
        raise CheckpointError(
            file, "general.alignment", f"got {clip(alignment)}; expected {allowed}."
        )
    return alignment


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    storage: str
    size_bytes: int
    offset: int


def _tensor_table(cursor: _Cursor, count: int) -> list[_Entry]:
    entries: dict[str, _Entry] = {}
    for number in range(count):
        name = cursor.text(f"tensor name {number}", most=MAX_NAME_BYTES)
        if name in entries:
            raise cursor.error(clip(name), "is there twice in the tensor table")
        entries[name] = _entry(cursor, name)
    return list(entries.values())


def _entry(cursor: _Cursor, name: str) -> _Entry:
    field = clip(name)
    dimensions = cursor.number(_U32, field)
    if dimensions > MAX_DIMENSIONS:
        raise cursor.error(field, f"has {dimensions:,} dimensions; at most {MAX_DIMENSIONS}")
    innermost_first = [cursor.number(_U64, field) for _ in range(dimensions)]
    kind, offset = cursor.number(_U32, field), cursor.number(_U64, field)
    if 0 in innermost_first:
        raise cursor.error(field, f"has the dimensions {innermost_first}; none may be 0")
    if kind not in GGML_TAGS:
        if kind in GGML_UNREAD:
            raise cursor.error(field, f"has the type {GGML_UNREAD[kind]}, not supported yet")
        raise cursor.error(field, f"has the unknown tensor type {kind}")
    shape = tuple(reversed(innermost_first))
    if math.prod(shape) * 8 > MAX_BYTES:
        raise cursor.error(field, f"has the dimensions {innermost_first}, which are too large")
    try:
        size = size_bytes(GGML_TAGS[kind], shape)
    except ValueError as error:
        raise cursor.error(field, str(error)) from error
    return _Entry(name, shape, GGML_TAGS[kind], size, offset)


def _lay_out(
    mapped: MappedFile, entries: list[_Entry], data_start: int, alignment: int
) -> dict[str, StoredTensor]:
    """Tensors follow each other in the table's order, each at the next multiple of the alignment:
    nothing overlaps, nothing is hidden between them, nothing lies outside of the file.
    """
    tensors: dict[str, StoredTensor] = {}
    expected = 0
    for entry in entries:
        field, start = clip(entry.name), data_start + entry.offset
        if entry.offset != expected:
            raise CheckpointError(
                mapped.file, field, f"has the offset {entry.offset:,}; expected {expected:,}."
            )
        if start + entry.size_bytes > mapped.size_bytes:
            raise CheckpointError(
                mapped.file,
                field,
                f"ends at byte {start + entry.size_bytes:,} of a file of {mapped.size_bytes:,}; "
                "the file was cut short. Fetch it again.",
            )
        tensors[entry.name] = StoredTensor(
            name=entry.name,
            shape=entry.shape,
            storage=entry.storage,
            size_bytes=entry.size_bytes,
            file=mapped.file,
            read=partial(mapped.view, entry.storage, entry.shape, start),
            release=mapped.release,
        )
        expected = _round_up(expected + entry.size_bytes, alignment)
    return tensors


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple
