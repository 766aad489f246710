"""Importance matrices of llama.cpp: how large the numbers are that meet each column of a matrix.

Two layouts. A GGUF of the type "imatrix" has two tensors for each matrix of a model, by its GGUF
name: `….in_sum2`, the squares of what came in, summed by column, and `….counts`, of how many rows.
The older ".dat" has, one after another, the name, a number of runs and the squares' means times
that number; then the number of runs and the file of the text. Experts' columns follow each other.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenkit.checkpoint.gguf import MAGIC, read_gguf
from qwenkit.checkpoint.gguf_write import TensorEntry, write_gguf
from qwenkit.checkpoint.names import given_path
from qwenkit.checkpoint.spec import StoredTensor
from qwenkit.errors import CheckpointError

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MOST_ENTRIES, _MOST_NAME_BYTES = 65_536, 4096
_I32 = struct.Struct("<i")


@dataclass(frozen=True, slots=True)
class ColumnSquares:
    """Of one matrix, or of as many as there are experts: `sums` fp32 [matrices, columns] of squares
    and `counts` fp32 [matrices] of the rows that they were summed over. Where an older file does
    not say how many matrices there are, it is one of all their columns.
    """

    sums: torch.Tensor
    counts: torch.Tensor

    def means(self, matrices: int, columns: int) -> torch.Tensor | None:
        """The mean square of each column, [matrices, columns]; 1 for a matrix that nothing came
        into. None where it is of other sizes.
        """
        if self.sums.numel() != matrices * columns or matrices % len(self.counts):
            return None
        counts = self.counts.repeat_interleave(matrices // len(self.counts)).unsqueeze(1)
        sums = self.sums.view(matrices, columns)
        return torch.where(counts > 0, sums / counts, 1.0)


@dataclass(frozen=True, slots=True)
class Imatrix:
    """An importance matrix: its entries by the GGUF names of the matrices, the texts that it was
    computed from, and how: `chunks` of `chunk_tokens` each, 0 where a file does not say.
    """

    entries: Mapping[str, ColumnSquares]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_tokens: int = 0


def read_imatrix(file: str | Path) -> Imatrix:
    """Read either layout. Raises CheckpointError naming the file and what is wrong with it."""
    path = given_path("imatrix", file)
    try:
        with path.open("rb") as opened:
            start = opened.read(len(MAGIC))
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(path, "imatrix", f"cannot be read: {reason}.") from error
    found = _read_gguf(path) if start == MAGIC else _read_legacy(path)
    if not found.entries:
        raise CheckpointError(path, "imatrix", "has no entries.")
    for name, entry in found.entries.items():
        for part in (entry.sums, entry.counts):
            if not bool((part >= 0).all() and part.isfinite().all()):
                raise CheckpointError(path, name, "has numbers that are negative or not finite.")
    return found


def write_imatrix(imatrix: Imatrix, file: str | Path) -> None:
    """Write a GGUF as `llama-imatrix` does. Raises CheckpointError when the disk refuses."""
    metadata: dict[str, Any] = {
        "general.type": "imatrix",
        "imatrix.datasets": ("str", list(imatrix.datasets)),
        "imatrix.chunk_count": imatrix.chunks,
        "imatrix.chunk_size": imatrix.chunk_tokens,
    }
    tensors: list[TensorEntry] = []
    for name, entry in sorted(imatrix.entries.items()):
        sums, counts = entry.sums.contiguous(), entry.counts.view(-1, 1).contiguous()
        tensors.append((f"{name}{_SUMS}", tuple(sums.shape), "F32", sums))
        tensors.append((f"{name}{_COUNTS}", tuple(counts.shape), "F32", counts))
    write_gguf(given_path("imatrix", file), metadata, tensors)


def _read_gguf(path: Path) -> Imatrix:
    file = read_gguf(path)
    kind = file.metadata.get("general.type")
    if kind not in ("imatrix", None):
        raise CheckpointError(path, "general.type", f"got {kind!r}; this is no importance matrix.")
    entries = {}
    for name in file.tensors:
        if name.endswith(_SUMS):
            matrix = name.removesuffix(_SUMS)
            sums, counts = (_numbers(path, file.tensors, matrix + end) for end in (_SUMS, _COUNTS))
            counts = counts.flatten()
            if sums.numel() % len(counts):
                raise CheckpointError(
                    path, name, f"{sums.numel()} sums do not belong to {len(counts)} counts."
                )
            entries[matrix] = ColumnSquares(sums.view(len(counts), -1), counts)
        elif not name.endswith(_COUNTS):
            raise CheckpointError(path, name, "is no part of an importance matrix.")
    datasets = file.metadata.get("imatrix.datasets", [])
    numbers = [file.metadata.get(f"imatrix.chunk_{word}", 0) for word in ("count", "size")]
    if not isinstance(datasets, list) or not all(isinstance(text, str) for text in datasets):
        raise CheckpointError(path, "imatrix.datasets", "expected a list of texts.")
    if not all(isinstance(number, int) for number in numbers):
        raise CheckpointError(path, "imatrix.chunk_count", "expected a whole number.")
    return Imatrix(entries, tuple(datasets), *numbers)


def _numbers(path: Path, tensors: Mapping[str, StoredTensor], name: str) -> torch.Tensor:
    stored = tensors.get(name)
    if stored is None:
        raise CheckpointError(path, name, "is missing.")
    if stored.storage != "F32":
        raise CheckpointError(path, name, f"is stored as {stored.storage}; expected F32.")
    return stored.read().clone()


def _read_legacy(path: Path) -> Imatrix:
    reader = _Legacy(path)
    entries = {}
    for number in range(reader.count("entries", 1, _MOST_ENTRIES)):
        name = reader.text(f"name {number}", most=_MOST_NAME_BYTES)
        runs = reader.whole(name)
        values = reader.count(name, 1, reader.left() // 4)
        sums = torch.frombuffer(bytearray(reader.take(4 * values, name)), dtype=torch.float32)
        counts = torch.tensor([float(max(runs, 1))])
        entries[name] = ColumnSquares(sums.unsqueeze(0), counts)
    if not reader.left():
        return Imatrix(entries)
    chunks = reader.count("number of runs", 0, 2**31 - 1)
    if not reader.left():
        return Imatrix(entries, chunks=chunks)
    return Imatrix(entries, (reader.text("dataset", most=reader.left()),), chunks)


class _Legacy:
    """Reads the older layout from front to back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray(path.read_bytes())
        self.at = 0

    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, size: int, field: str) -> memoryview:
        if size > self.left():
            raise CheckpointError(
                self.path,
                field,
                f"needs {size:,} bytes, {self.left():,} are left: this is no importance matrix, or "
                "it was cut short.",
            )
        self.at += size
        return memoryview(self.data)[self.at - size : self.at]

    def whole(self, field: str) -> int:
        number: int = _I32.unpack(self.take(_I32.size, field))[0]
        return number

    def count(self, field: str, least: int, most: int) -> int:
        number = self.whole(field)
        if not least <= number <= most:
            raise CheckpointError(
                self.path,
                field,
                f"got the count {number:,}; this is no importance matrix, or it is damaged.",
            )
        return number

    def text(self, field: str, *, most: int) -> str:
        encoded = self.take(self.count(field, 0, most), field)
        try:
            return str(encoded, "utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(self.path, field, "is not UTF-8.") from error
