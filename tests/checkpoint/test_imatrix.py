"""Importance matrices: both layouts are read, ours is read again, what is neither is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from qwenkit.checkpoint.gguf import read_gguf
from qwenkit.checkpoint.gguf_write import write_gguf
from qwenkit.checkpoint.imatrix import ColumnSquares, Imatrix, read_imatrix, write_imatrix
from qwenkit.errors import CheckpointError, UsageError


def _entry(matrices: int, columns: int) -> ColumnSquares:
    generator = torch.Generator().manual_seed(columns)
    counts = torch.arange(matrices).float() * 3  # nothing came into the first
    return ColumnSquares(
        torch.rand(matrices, columns, generator=generator), counts + (matrices == 1)
    )


def _legacy(entries: dict[str, tuple[int, list[float]]], tail: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, (runs, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack(f"<ii{len(values)}f", runs, len(values), *values)
    return data + tail


def test_what_is_written_is_read(tmp_path: Path) -> None:
    entries = {"blk.1.ffn_down_exps.weight": _entry(4, 8), "blk.0.attn_q.weight": _entry(1, 8)}
    imatrix = Imatrix(entries, datasets=("文.txt",), chunks=12, chunk_tokens=512)
    file = tmp_path / "i.gguf"
    write_imatrix(imatrix, file)
    again = read_imatrix(file)
    assert (again.datasets, again.chunks, again.chunk_tokens) == (("文.txt",), 12, 512)
    assert sorted(again.entries) == sorted(entries)
    for name, entry in entries.items():
        assert torch.equal(again.entries[name].sums, entry.sums)
        assert torch.equal(again.entries[name].counts, entry.counts)


def test_the_file_is_as_llama_imatrix_writes_it(tmp_path: Path) -> None:
    write_imatrix(Imatrix({"b": _entry(4, 8), "a": _entry(1, 8)}), tmp_path / "i.gguf")
    file = read_gguf(tmp_path / "i.gguf")
    assert file.metadata == {
        "general.type": "imatrix",
        "imatrix.datasets": [],
        "imatrix.chunk_count": 0,
        "imatrix.chunk_size": 0,
    }
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    assert shapes == {
        "a.in_sum2": (1, 8),
        "a.counts": (1, 1),
        "b.in_sum2": (4, 8),
        "b.counts": (4, 1),
    }


def test_means_are_sums_over_counts() -> None:
    sums = torch.tensor([[2.0, 4.0], [9.0, 3.0]])
    entry = ColumnSquares(sums, torch.tensor([0.0, 3.0]))
    means = entry.means(2, 2)
    assert means is not None
    assert means.tolist() == [[1.0, 1.0], [3.0, 1.0]]  # nothing came into the first
    assert entry.means(1, 4) is None
    assert entry.means(2, 3) is None
    one = ColumnSquares(sums.view(1, 4), torch.tensor([2.0])).means(2, 2)  # as an old file says it
    assert one is not None
    assert one.tolist() == [[1.0, 2.0], [4.5, 1.5]]


def test_the_older_layout_is_read(tmp_path: Path) -> None:
    file = tmp_path / "imatrix.dat"
    entries = {"blk.0.attn_q.weight": (4, [2.0, 8.0]), "blk.0.ffn_up.weight": (0, [5.0, 1.0])}
    tail = struct.pack("<ii", 7, 8) + b"wiki.raw"
    for ending, datasets, chunks in ((tail, ("wiki.raw",), 7), (tail[:4], (), 7), (b"", (), 0)):
        file.write_bytes(_legacy(entries, ending))
        imatrix = read_imatrix(file)
        assert (imatrix.datasets, imatrix.chunks) == (datasets, chunks)
        means = {n: e.means(1, 2) for n, e in imatrix.entries.items()}
        assert means["blk.0.attn_q.weight"].tolist() == [[0.5, 2.0]]  # type: ignore[union-attr]
        assert means["blk.0.ffn_up.weight"].tolist() == [[5.0, 1.0]]  # type: ignore[union-attr]


def test_what_is_no_importance_matrix_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x"
    whole = _legacy({"a": (1, [1.0, 2.0])})
    wrong = [
        (b"", "needs 4 bytes"),
        (b"{}\n\n", "count"),
        (struct.pack("<i", 0), "count 0"),
        (whole[:-3], "needs 8 bytes, 5 are left"),
        (whole.replace(b"a", b"\xff"), "UTF-8"),
        (_legacy({"a": (1, [float("nan")])}), "not finite"),
        (_legacy({"a": (1, [-1.0])}), "negative"),
    ]
    for data, message in wrong:
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            read_imatrix(file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_imatrix(tmp_path / "gone")
    with pytest.raises(UsageError, match="imatrix: expected a path"):
        read_imatrix("")


def test_a_gguf_of_another_kind_is_refused(tmp_path: Path) -> None:
    file, numbers = tmp_path / "x.gguf", torch.ones(3)
    sums, counts = ("a.in_sum2", (3,), "F32", numbers), ("a.counts", (1,), "F32", numbers[:1])
    wrong = [
        ({"general.type": "model"}, [sums, counts], "'model'; this is no importance"),
        ({}, [sums], r"a\.counts: is missing"),
        ({}, [sums, ("a.counts", (2,), "F32", numbers[:2])], "do not belong to 2 counts"),
        ({}, [sums, ("a.counts", (1,), "F16", numbers[:1].half())], "stored as F16"),
        ({}, [("token_embd.weight", (3,), "F32", numbers)], "is no part of an importance"),
        ({}, [], "has no entries"),
        ({"imatrix.datasets": "text"}, [sums, counts], "a list of texts"),
        ({"imatrix.chunk_count": "many"}, [sums, counts], "a whole number"),
    ]
    for metadata, tensors, message in wrong:
        write_gguf(file, metadata, tensors)
        with pytest.raises(CheckpointError, match=message):
            read_imatrix(file)
