"""Reading of safetensors files, by the format's published description.

8 bytes: length of the header (little-endian); the header: JSON, name → dtype, shape, data_offsets;
then the data. The header is scanned by hand, in one pass without recursion: a strict grammar (no
key twice, nothing but the three known keys, whole numbers only) leaves no room for two readers to
see two files, and a hostile header cannot grow in memory. No tensor data is touched.
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
MAX_DIMENSIONS = 64  # no array library takes more
MAX_BYTES = 2**63 - 1  # what a tensor library's own integers can count

_WHITE = r"[ \t\n\r]*+"
_SPACE = re.compile(_WHITE)
_STRING = re.compile(r'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"')
_NUMBER = rf"(?:0|[1-9][0-9]*+){_WHITE}"
_NUMBERS = re.compile(rf"\[{_WHITE}(?:{_NUMBER}(?:,{_WHITE}{_NUMBER})*+)?+\]")
_NUMBER_DIGITS = 19  # of 2**63 - 1
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
        )
        for e in entries
    }


def _header(mapped: MappedFile) -> tuple[str, int]:
    """The header's text and where the data starts."""
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
    raw = mapped.buffer[8 : 8 + length]
    if not raw.startswith(b"{"):
        raise CheckpointError(file, "header", "does not start with '{'; not a safetensors file.")
    try:
        return raw.decode("utf-8"), 8 + length
    except UnicodeDecodeError as error:
        raise CheckpointError(file, f"header byte {error.start}", "is not UTF-8.") from error


class _Scanner:
    """Reads the header from left to right; `at` is the place of the next character."""

    def __init__(self, file: Path, text: str) -> None:
        self.file = file
        self.text = text
        self.at = 0

    def entries(self) -> list[_Entry]:
        """Every tensor, in the header's order."""
        found: dict[str, _Entry] = {}
        metadata: dict[str, str] | None = None
        self._expect("{")
        while not self._closes(first=not found and metadata is None):
            name = self._string("tensor name")
            self._expect(":")
            if name in found or (name == "__metadata__" and metadata is not None):
                raise self._error(clip(name), "is there twice")
            if name == "__metadata__":
                metadata = self._texts()
            else:
                found[name] = self._entry(name)
        self._skip_space()
        if self.at != len(self.text):
            raise self._error("header", "goes on after its closing brace")
        return list(found.values())

    def _entry(self, name: str) -> _Entry:
        dtype: str | None = None
        numbers: dict[str, tuple[int, ...]] = {}
        self._expect("{")
        while not self._closes(first=dtype is None and not numbers):
            key = self._string(clip(name))
            self._expect(":")
            if key in numbers or (key == "dtype" and dtype is not None):
                raise self._error(clip(name), f"has {key!r} twice")
            if key == "dtype":
                dtype = self._string(clip(name))
            elif key in _KEYS:
                numbers[key] = self._numbers(f"{clip(name)} {key}")
            else:
                raise self._error(clip(name), f"has the unknown key {clip(key)}")
        if dtype is None or len(numbers) != 2:
            missing = [k for k in _KEYS if k not in numbers and (k != "dtype" or dtype is None)]
            raise self._error(clip(name), f"lacks {' and '.join(missing)}")
        if dtype not in PLAIN:
            raise self._error(
                clip(name), f"dtype {clip(dtype)} is unknown. {suggest(dtype, PLAIN)}"
            )
        offsets, shape = numbers["data_offsets"], numbers["shape"]
        if len(offsets) != 2:
            raise self._error(clip(name), f"data_offsets has {len(offsets)} numbers instead of 2")
        return _Entry(name, dtype, shape, *offsets)

    def _texts(self) -> dict[str, str]:
        """`__metadata__`: an object of strings only."""
        texts: dict[str, str] = {}
        self._expect("{")
        while not self._closes(first=not texts):
            key = self._string("__metadata__")
            self._expect(":")
            if key in texts:
                raise self._error("__metadata__", f"has {clip(key)} twice")
            texts[key] = self._string("__metadata__")
        return texts

    def _closes(self, *, first: bool) -> bool:
        """True at the closing brace; else steps over the comma that must stand between items."""
        self._skip_space()
        if self.text[self.at : self.at + 1] == "}":
            self.at += 1
            return True
        if not first:
            self._expect(",")
        return False

    def _skip_space(self) -> None:
        if match := _SPACE.match(self.text, self.at):
            self.at = match.end()

    def _expect(self, character: str) -> None:
        self._skip_space()
        if self.text[self.at : self.at + 1] != character:
            found = clip(self.text[self.at : self.at + 1] or "the end")
            raise self._error("header", f"expected {character!r}, found {found}")
        self.at += 1

    def _string(self, field: str) -> str:
        self._skip_space()
        match = _STRING.match(self.text, self.at)
        if match is None:
            raise self._error(field, "expected a string")
        self.at = match.end()
        raw = match.group()
        if "\\" not in raw:
            return raw[1:-1]
        try:
            text: str = json.loads(raw)
            text.encode("utf-8")  # half a surrogate pair is no character
        except ValueError as error:
            raise self._error(field, "has a malformed escape in a string") from error
        return text

    def _numbers(self, field: str) -> tuple[int, ...]:
        self._skip_space()
        match = _NUMBERS.match(self.text, self.at)
        if match is None:
            raise self._error(field, "expected a list of whole numbers from 0 up")
        self.at = match.end()
        digits = match.group()[1:-1].replace(",", " ").split()
        if len(digits) > MAX_DIMENSIONS or any(len(d) > _NUMBER_DIGITS for d in digits):
            raise self._error(field, f"has over {MAX_DIMENSIONS} numbers, or one over 2**63")
        return tuple(int(d) for d in digits)

    def _error(self, field: str, message: str) -> CheckpointError:
        return CheckpointError(self.file, field, f"{message} (header character {self.at}).")


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
