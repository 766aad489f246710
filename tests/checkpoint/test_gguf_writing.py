"""GGUF writing: what is written is read, and what has no place in the format is refused."""

from __future__ import annotations

import math
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crafted import ARRAY, model_gguf, peak_memory_growth
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.checkpoint.gguf import read_gguf
from qwenkit.checkpoint.gguf_write import TYPES, Value, write_gguf
from qwenkit.checkpoint.storages import BLOCKS, GGML_NUMBERS, size_bytes
from qwenkit.errors import UsageError

KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
INTEGERS = st.integers(-(2**63), 2**64 - 1)
SINGLES = st.floats(width=32, allow_nan=False)
SCALARS = st.one_of(st.booleans(), INTEGERS, SINGLES, TEXTS)
LISTS = st.one_of(
    st.lists(st.booleans(), min_size=1, max_size=5),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5),
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5),
    st.lists(SINGLES, min_size=1, max_size=5),
    st.lists(TEXTS, min_size=1, max_size=5),
)
METADATA: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    KEYS.filter(lambda k: k not in ("general.alignment", "split.count")),
    st.one_of(SCALARS, LISTS),
    max_size=6,
)


@st.composite
def entries(draw: st.DrawFn) -> list[tuple[str, list[int], str, bytes]]:
    rows = []
    for name in draw(st.lists(KEYS, unique=True, max_size=5)):
        storage = draw(st.sampled_from(sorted(GGML_NUMBERS)))
        shape = draw(st.lists(st.integers(1, 3), max_size=4))
        if storage in BLOCKS:
            shape = [*shape[:3], BLOCKS[storage].elements * draw(st.integers(1, 2))]
        size = size_bytes(storage, tuple(shape))
        rows.append((name, shape, storage, random.Random(draw(st.integers())).randbytes(size)))
    return rows


def as_single(value: Any) -> Any:
    """What is left of a value that goes through a float32 and is given back at its shortest."""
    if isinstance(value, float) and math.isfinite(value):
        return struct.unpack("<f", struct.pack("<f", value))[0]
    return value


@settings(max_examples=100, deadline=None)
@given(metadata=METADATA, rows=entries(), alignment=st.sampled_from([8, 32, 256]))
def test_what_is_written_is_read(
    metadata: dict[str, Any],
    rows: list[tuple[str, list[int], str, bytes]],
    alignment: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.mktemp("round") / "m.gguf"
    write_gguf(file, metadata, rows, alignment=alignment)
    read = read_gguf(file)
    found = {k: as_single(v) for k, v in read.metadata.items() if k != "general.alignment"}
    assert found == metadata
    assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in metadata.items()}
    assert list(read.tensors) == [name for name, _, _, _ in rows]
    for name, shape, storage, raw in rows:
        stored = read.tensors[name]
        assert (list(stored.shape), stored.storage) == (shape, storage)
        assert bytes(stored.read().reshape(-1).view(torch.uint8).tolist()) == raw


def test_a_written_file_can_be_written_again_from_what_was_read(tmp_path: Path) -> None:
    first, second = tmp_path / "1.gguf", tmp_path / "2.gguf"
    first.write_bytes(model_gguf().build())
    read = read_gguf(first)
    metadata = {k: v for k, v in read.metadata.items() if k != "test.nested"}
    tensors = [(t.name, t.shape, t.storage, t.read) for t in read.tensors.values()]
    write_gguf(second, metadata, tensors)
    again = read_gguf(second)
    assert again.metadata == metadata
    for name, stored in read.tensors.items():
        left, right = stored.read().reshape(-1), again.tensors[name].read().reshape(-1)
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, "bool"),
        (0, "u32"),
        (2**32 - 1, "u32"),
        (-1, "i32"),
        (2**32, "u64"),
        (-(2**31) - 1, "i64"),
        (0.5, "f32"),
        ("x", "str"),
        ([1, 2], "i32"),
        ([2**31], "u32"),
        ([-1, 2**31], "i64"),
        ([2**63], "u64"),
        (("u8", 7), "u8"),
        (("f64", 0.1), "f64"),
        (("i16", [1, -2]), "i16"),
        (("str", []), "str"),
    ],
)
def test_types_are_chosen_or_said(value: Any, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, {"k": value}, [])
    at = 24 + 8 + 1  # after the header and the key
    outer, inner = struct.unpack_from("<II", file.read_bytes() + bytes(8), at)
    plain = value[1] if isinstance(value, tuple) else value
    assert (inner if outer == ARRAY else outer) == TYPES[kind]
    assert read_gguf(file).metadata["k"] == plain


@pytest.mark.parametrize(
    "metadata",
    [
        {"k": []},
        {"k": [1, "a"]},
        {"k": [1, True]},
        {"k": None},
        {"k": [[1]]},
        {"k": 2**64},
        {"k": -(2**63) - 1},
        {"k": 1e300},
        {"k": ("u8", 256)},
        {"k": ("u9", 1)},
        {"k": ("bool", 2)},
        {"k": ("str", 2)},
        {"k": ("u8", "x")},
        {"k": (1, 2, 3)},
        {"k": "\ud800"},
        {"": 1},
    ],
)
def test_metadata_without_a_place_are_refused(metadata: dict[str, Value], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write_gguf(tmp_path / "m.gguf", metadata, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "row",
    [
        ("", (2,), "F32", bytes(8)),
        ("t", (2,), "F33", bytes(8)),
        ("t", (2,), "U8", bytes(2)),
        ("t", (0,), "F32", b""),
        ("t", (1, 1, 1, 1, 1), "F32", bytes(4)),
        ("t", (33,), "Q4_0", bytes(18)),
        ("t", (2,), "F32", bytes(7)),
        ("t", (2,), "F32", torch.zeros(3)),
        ("t", (2,), "F32", torch.zeros(4, dtype=torch.float16)),
        ("t", (32,), "Q4_0", torch.zeros(18)),
        ("t", (2,), "F32", lambda: bytes(9)),
    ],
)
def test_tensors_without_a_place_are_refused(row: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write_gguf(tmp_path / "m.gguf", {}, [row])
    assert list(tmp_path.iterdir()) == []


def test_a_name_twice_and_an_odd_alignment_are_refused(tmp_path: Path) -> None:
    row = ("t", (1,), "I8", b"x")
    with pytest.raises(UsageError, match="twice"):
        write_gguf(tmp_path / "m.gguf", {}, [row, row])
    with pytest.raises(UsageError, match="alignment"):
        write_gguf(tmp_path / "m.gguf", {}, [row], alignment=24)


@pytest.mark.skipif(sys.platform != "linux", reason="reads its own memory from /proc")
def test_writing_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    # 40 MiB: above 32 MiB glibc maps each block by itself, so that freed memory is given back at
    # once and what is resident is what is held.
    count = 10 * 2**20

    def making(value: int) -> Callable[[], torch.Tensor]:
        return lambda: torch.full((count,), value, dtype=torch.int32)

    rows = [(f"t{i}", (count,), "I32", making(i)) for i in range(5)]
    with peak_memory_growth() as growth:
        write_gguf(tmp_path / "m.gguf", {}, rows)
    assert growth[0] < 2.5 * 4 * count
    assert read_gguf(tmp_path / "m.gguf").tensors["t4"].read()[-1] == 4


def test_a_tensor_may_come_in_pieces(tmp_path: Path) -> None:
    numbers = torch.arange(24, dtype=torch.float32).view(6, 4)
    pieces = [numbers[:1], numbers[1:5].numpy().tobytes(), numbers[5:]]
    rows = [("a", (6, 4), "F32", lambda: iter(pieces)), ("b", (4,), "F32", numbers[0])]
    write_gguf(tmp_path / "m.gguf", {}, rows)
    tensors = read_gguf(tmp_path / "m.gguf").tensors
    assert torch.equal(tensors["a"].read(), numbers)
    assert torch.equal(tensors["b"].read(), numbers[0])
    for wrong, message in ((pieces[:2], "needs 96 bytes, got 80"), ([numbers.half()], "float16")):
        with pytest.raises(UsageError, match=message):
            write_gguf(tmp_path / "n.gguf", {}, [("a", (6, 4), "F32", lambda w=wrong: iter(w))])
    assert not (tmp_path / "n.gguf").exists()
