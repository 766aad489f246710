"""Reading of safetensors files, by the format's published description.

8 bytes: length of the header (little-endian); the header: JSON, name → dtype, shape, data_offsets;
then the data. The header is scanned by hand where it lies, in one pass without recursion: a strict
grammar (no key twice, nothing but the three known keys, whole numbers only) leaves no room for two
readers to see two files, and a hostile header cannot grow in memory. No tensor data is touched.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qwenkit.checkpoint.mapping import MappedFile
from qwenkit.checkpoint.members import clip, refuse_lfs_pointer
from qwenkit.checkpoint.spec import StoredTensor
from qwenkit.checkpoint.storages import PLAIN
from qwenkit.errors import CheckpointError, suggest

MAX_HEADER_BYTES = 100_000_000
MAX_ENTRIES = 65_536  # tensors of one file, and notes in its metadata
MAX_DIMENSIONS = 64  # no array library takes more
MAX_BYTES = 2**63 - 1  # what a tensor library's own integers can count

_WHITE = rb"[ \t\n\r]*+"
_SPACE = re.compile(_WHITE)
_STRING = re.compile(_WHITE + rb'("[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+")')
_NUMBER = rb"(?:0|[1-9][0-9]{0,18}+)" + _WHITE  # 2**63 - 1 has 19 digits
_MORE = rb"(?:," + _WHITE + _NUMBER + rb"){0,%d}+" % (MAX_DIMENSIONS - 1)
_NUMBERS = re.compile(_WHITE + rb"\[" + _WHITE + rb"((?:" + _NUMBER + _MORE + rb")?+)\]")
_KEYS = ("dtype", "shape", "data_offsets")


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, as memory-mapped views, by name.

    Raises CheckpointError naming the file and the field or tensor at fault.
    """
    refuse_lfs_pointer(file)
    mapped = MappedFile(file)
    header, data_start = _header(mapped)
    entries = _Scanner(file, header).entries()
    _check_layout(file, entries, mapped.size_bytes - data_start)
    return {
        e.name: StoredTensor(
            name=e.name,
            shape=e.shape,
            storage=e.dtype,
            size_bytes=e.end - e.begin,
            file=file,
            read=partial(mapped.view, e.dtype, e.shape, data_start + e.begin),
            release=mapped.release,
        )
        for e in entries
    }


def _header(mapped: MappedFile) -> tuple[memoryview, int]:
    """The header's bytes and where the data starts."""
    file, field = mapped.file, "header length"
    if mapped.size_bytes < 10:
        raise CheckpointError(file, field, f"the file has only {mapped.size_bytes} bytes.")
    length = int.from_bytes(mapped.buffer[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(file, field, f"{length:,} bytes; at most {MAX_HEADER_BYTES:,}.")
    if 8 + length > mapped.size_bytes:
        raise CheckpointError(
            file, field, f"{length:,} bytes, but the file has only {mapped.size_bytes:,}."
        )
    header = memoryview(mapped.buffer)[8 : 8 + length]
    if bytes(header[:1]) != b"{":
        raise CheckpointError(file, "header", "does not start with '{'; not a safetensors file.")
    return header, 8 + length


class _Scanner:
    """Reads the header from left to right; `at` is the place of the next byte."""

    def __init__(self, file: Path, header: memoryview) -> None:
        self.file = file
        self.header = header
        self.at = 0

    def entries(self) -> list[_Entry]:
        """Every tensor, in the header's order."""
        found: dict[str, _Entry] = {}
        metadata: set[str] | None = None
        self._expect(b"{")
        while not self._closes(first=not found and metadata is None):
            name = self._string("tensor name")
            self._expect(b":")
            if name in found or (name == "__metadata__" and metadata is not None):
                raise self._error(clip(name), "is there twice")
            if name == "__metadata__":
                metadata = self._texts()
            else:
                found[name] = self._entry(name)
            if len(found) > MAX_ENTRIES:
                raise self._error("header", f"has over {MAX_ENTRIES:,} tensors")
        if self._next():
            raise self._error("header", "goes on after its closing brace")
        return list(found.values())

    def _entry(self, name: str) -> _Entry:
        field = clip(name)
        dtype: str | None = None
        numbers: dict[str, tuple[int, ...]] = {}
        self._expect(b"{")
        while not self._closes(first=dtype is None and not numbers):
            key = self._string(field)
            self._expect(b":")
            if key in numbers or (key == "dtype" and dtype is not None):
                raise self._error(field, f"has {key!r} twice")
            if key == "dtype":
                dtype = self._string(field)
            elif key in _KEYS:
                numbers[key] = self._numbers(field, key)
            else:
                raise self._error(field, f"has the unknown key {clip(key)}")
        if dtype is None or len(numbers) != 2:
            missing = [k for k in _KEYS if k not in numbers and (k != "dtype" or dtype is None)]
            raise self._error(field, f"lacks {' and '.join(missing)}")
        if dtype not in PLAIN:
            hint = suggest(dtype[:16], PLAIN)
            raise self._error(field, f"dtype {clip(dtype)} cannot be read. {hint}")
        offsets, shape = numbers["data_offsets"], numbers["shape"]
        if len(offsets) != 2:
            raise self._error(field, f"data_offsets has {len(offsets)} numbers instead of 2")
        return _Entry(name, dtype, shape, *offsets)

    def _texts(self) -> set[str]:
        """`__metadata__`, an object of strings only; returns its keys."""
        keys: set[str] = set()
        self._expect(b"{")
        while not self._closes(first=not keys):
            key = self._string("__metadata__")
            self._expect(b":")
            self._string("__metadata__")
            if key in keys or len(keys) == MAX_ENTRIES:
                raise self._error("__metadata__", f"has {clip(key)} twice, or too many keys")
            keys.add(key)
        return keys

    def _closes(self, *, first: bool) -> bool:
        """True at the closing brace; else steps over the comma that must stand between items."""
        if self._next() == b"}":
            self.at += 1
            return True
        if not first:
            self._expect(b",")
        return False

    def _next(self) -> bytes:
        """The next byte that is no white space, not yet stepped over; empty at the end."""
        if match := _SPACE.match(self.header, self.at):
            self.at = match.end()
        return bytes(self.header[self.at : self.at + 1])

    def _expect(self, character: bytes) -> None:
        found = self._next()
        if found != character:
            wanted = character.decode()
            raise self._error("header", f"expected {wanted!r}, found {found or 'the end'!r}")
        self.at += 1

    def _string(self, field: str) -> str:
        match = _STRING.match(self.header, self.at)
        if match is None:
            raise self._error(field, "expected a string")
        self.at = match.end()
        raw = match[1]
        try:
            text: str = raw.decode()
            if "\\" not in text:
                return text[1:-1]
            text = json.loads(text)
            text.encode()  # half a surrogate pair is no character
        except ValueError as error:
            raise self._error(field, "has a malformed character in a string") from error
        return text

    def _numbers(self, field: str, key: str) -> tuple[int, ...]:
        match = _NUMBERS.match(self.header, self.at)
        if match is None:
            most = f"up to {MAX_DIMENSIONS} whole numbers from 0 to 2**63"
            raise self._error(field, f"{key}: expected a list of {most}")
        self.at = match.end()
        return tuple(map(int, match[1].replace(b",", b" ").split()))

    def _error(self, field: str, message: str) -> CheckpointError:
        return CheckpointError(self.file, field, f"{message} (header byte {self.at:,}).")


def _check_layout(file: Path, entries: list[_Entry], data_bytes: int) -> None:
    """Every tensor has the bytes that its shape needs, and together they fill the data exactly."""
    position, previous = 0, "the header"
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        field = clip(entry.name)
        needed = PLAIN[entry.dtype].itemsize * math.prod(entry.shape)
        # Empty tensors count their other dimensions too: strides are made of them.
        span = PLAIN[entry.dtype].itemsize * math.prod(d for d in entry.shape if d)
        if span > MAX_BYTES:
            raise CheckpointError(file, field, f"shape {list(entry.shape)} is too large.")
        if entry.end - entry.begin != needed:
            raise CheckpointError(
                file,
                field,
                f"data_offsets [{entry.begin}, {entry.end}] hold {entry.end - entry.begin} bytes; "
                f"{entry.dtype} {list(entry.shape)} needs {needed}.",
            )
        if entry.begin != position:
            fault = "overlaps" if entry.begin < position else "leaves a hole after"
            raise CheckpointError(file, field, f"{fault} {previous} at byte {entry.begin}.")
        position, previous = entry.end, field
    if position != data_bytes:
        raise CheckpointError(
            file, "data", f"the header describes {position:,} bytes, the file has {data_bytes:,}."
        )
