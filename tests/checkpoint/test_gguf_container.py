"""GGUF: every kind of malformed header is refused by name, and a well-formed one is read."""

from __future__ import annotations

import dataclasses
import random
import struct
import sys
from pathlib import Path

import pytest
import torch
from crafted import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    U8,
    U32,
    U64,
    Gguf,
    Key,
    Tensor,
    array,
    model_gguf,
    peak_memory_growth,
    scalar,
    text,
)

from qwenkit.checkpoint.gguf import MAX_ARRAY_ITEMS, read_gguf
from qwenkit.checkpoint.gguf_write import write_gguf
from qwenkit.checkpoint.storages import GGML_NUMBERS, read_dtype, read_shape
from qwenkit.errors import CheckpointError

REPLACE = dataclasses.replace
NOISE = random.Random(1).randbytes(4096)


def key(value_type: int, value: bytes, name: str | bytes = "k") -> Gguf:
    return Gguf(keys=[(name, value_type, value)])


def tensor(*dimensions: int, kind: int = 0, offset: int | None = None, raw: bytes = NOISE) -> Gguf:
    return Gguf(tensors=[("t", dimensions, kind, offset, raw)])


def two(offset: int, alignment: int = 32) -> Gguf:
    """Two tensors of 64 bytes, the second at `offset`."""
    rows: list[Tensor] = [("s", (16,), 0, 0, NOISE[:64]), ("t", (16,), 0, offset, NOISE[:64])]
    return Gguf(tensors=rows, alignment=alignment)


def aligned(value_type: int, alignment: int) -> Gguf:
    return key(value_type, scalar(value_type, alignment), "general.alignment")


def head(kind: int, count: int) -> bytes:
    return struct.pack("<IQ", kind, count)


def after_counts(tensor_count: int, key_count: int, *pieces: bytes) -> bytes:
    """A header whose rest is given as bytes."""
    return Gguf(tensor_count=tensor_count, key_count=key_count).build()[:24] + b"".join(pieces)


NESTED = head(ARRAY, 1) * 4 + head(U8, 0)
DEEP = head(ARRAY, 1) * 100_000
LONG = struct.pack("<Q", 2**63) + b"k"
OVER = struct.pack("<Q", 2**64 - 1) + b"k"

MALFORMED: dict[str, tuple[Gguf | bytes, str]] = {
    "empty file": (b"", "file"),
    "one byte": (b"G", "magic"),
    "header alone": (b"GGUF\x03\0\0\0", "tensor count"),
    "bad magic": (REPLACE(model_gguf(), magic=b"GGML"), "magic"),
    "version 0": (REPLACE(model_gguf(), version=struct.pack("<I", 0)), "version"),
    "version 1": (REPLACE(model_gguf(), version=struct.pack("<I", 1)), "version"),
    "version of the future": (REPLACE(model_gguf(), version=struct.pack("<I", 4)), "version"),
    "big-endian": (REPLACE(model_gguf(), version=struct.pack(">I", 3)), "version"),
    "tensor count of all ones": (Gguf(tensor_count=2**64 - 1), "tensor count"),
    "tensor count one too many": (REPLACE(tensor(4), tensor_count=2, data=b""), "tensor count"),
    "key count of all ones": (Gguf(key_count=2**64 - 1), "metadata count"),
    "key count over the room": (REPLACE(key(U8, b"\1"), key_count=100), "metadata count"),
    "key longer than the file": (after_counts(0, 1, LONG, bytes(99)), "metadata key 0"),
    "key empty": (key(U8, b"\1", ""), "metadata key 0"),
    "key of 70,000 bytes": (key(U8, b"\1", "k" * 70_000), "metadata key 0"),
    "key not UTF-8": (key(U8, b"\1", b"\xff"), "metadata key 0"),
    "key twice": (Gguf(keys=[("k", U8, b"\1")] * 2), "'k'"),
    "value type 13": (key(13, bytes(8)), "'k'"),
    "value type of all ones": (key(2**32 - 1, bytes(8)), "'k'"),
    "text longer than the file": (key(STRING, LONG), "'k'"),
    "text of 2^64 - 1 bytes": (key(STRING, OVER), "'k'"),
    "text not UTF-8": (key(STRING, text(b"\xc3\x28")), "'k'"),
    "flag of 2": (key(BOOL, b"\2"), "'k'"),
    "flag of 2 in a list": (key(ARRAY, head(BOOL, 2) + b"\1\2"), "'k'"),
    "array of 2^63": (key(ARRAY, head(U8, 2**63)), "'k'"),
    "array of 2^64 - 1 texts": (key(ARRAY, head(STRING, 2**64 - 1) + bytes(64)), "'k'"),
    "array over its room": (key(ARRAY, head(U64, 100) + bytes(64)), "'k'"),
    "array of an unknown type": (key(ARRAY, head(99, 1) + bytes(64)), "'k'"),
    "texts that run out": (key(ARRAY, head(STRING, 2) + text("a") + LONG), "'k'[1]"),
    "texts cut within a length": (
        after_counts(0, 1, text("k"), scalar(U32, ARRAY), head(STRING, 3), text(bytes(23)), b"\0"),
        "'k'[1]",
    ),
    "texts not UTF-8": (key(ARRAY, head(STRING, 2) + text("a") + text(b"\xff")), "'k'[1]"),
    "arrays too deep": (key(ARRAY, NESTED), "'k'"),
    "arrays 100,000 deep": (key(ARRAY, DEEP), "'k'"),
    "arrays of arrays of 2^32": (key(ARRAY, head(ARRAY, 2**32) + bytes(99)), "'k'"),
    "alignment 0": (aligned(U32, 0), "general.alignment"),
    "alignment 4": (aligned(U32, 4), "general.alignment"),
    "alignment 33": (aligned(U32, 33), "general.alignment"),
    "alignment 2^31": (aligned(U32, 2**31), "general.alignment"),
    "alignment 2^63": (aligned(U64, 2**63), "general.alignment"),
    "alignment a fraction": (aligned(F32, 32), "general.alignment"),
    "alignment a text": (key(STRING, text("32"), "general.alignment"), "general.alignment"),
    "alignment a list": (key(ARRAY, array(U32, [32]), "general.alignment"), "general.alignment"),
    "alignment a flag": (key(BOOL, b"\1", "general.alignment"), "general.alignment"),
    "one part of several": (key(U32, scalar(U32, 3), "split.count"), "split.count"),
    "tensor name longer than the file": (
        after_counts(1, 0, LONG, bytes(99)),
        "tensor name 0",
    ),
    "tensor name empty": (Gguf(tensors=[("", (4,), 0, 0, NOISE)]), "tensor name 0"),
    "tensor name not UTF-8": (Gguf(tensors=[(b"\x80", (4,), 0, 0, NOISE)]), "tensor name 0"),
    "tensor name twice": (Gguf(tensors=[("t", (4,), 0, None, NOISE)] * 2), "'t'"),
    "5 dimensions": (tensor(1, 1, 1, 1, 1), "'t'"),
    "2^32 - 1 dimensions": (
        after_counts(1, 0, text("t"), b"\xff" * 4, bytes(999)),
        "'t'",
    ),
    "dimension 0": (tensor(4, 0), "'t'"),
    "dimension -1": (tensor(2**64 - 1), "'t'"),
    "product over 2^63": (tensor(2**32, 2**32), "'t'"),
    "product is 4 modulo 2^64": (tensor(2**62, 4, 2**62, 4), "'t'"),
    "row no whole number of blocks": (tensor(33, kind=2), "'t'"),
    "a single number as blocks": (tensor(kind=2), "'t'"),
    "tensor type 4": (tensor(32, kind=4), "'t'"),
    "tensor type of all ones": (tensor(32, kind=2**32 - 1), "'t'"),
    "tensor type not read yet": (tensor(256, kind=16), "'t'"),
    "offset not aligned": (two(65), "'t'"),
    "offset overlaps": (two(32), "'t'"),
    "offset leaves a hole": (two(96), "'t'"),
    "offset of another alignment": (REPLACE(two(128), alignment=128), "'t'"),
    "offset past the end": (two(2**63), "'t'"),
    "offset wraps round": (two(2**64 - 32), "'t'"),
    "first offset not 0": (tensor(4, offset=32), "'t'"),
    "data cut short": (tensor(1025), "'t'"),
    "data absent": (REPLACE(tensor(4), data=b""), "'t'"),
    "declared larger than the file": (tensor(2**40), "'t'"),
    "git-LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "content",
    ),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    source, field = MALFORMED[kind]
    raw = source if isinstance(source, bytes) else source.build()
    file = tmp_path / "m.gguf"
    file.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        read_gguf(file)
    assert (caught.value.file, caught.value.field) == (str(file), field)
    assert len(str(caught.value)) < 1000


def test_messages_say_what_is_wrong(tmp_path: Path) -> None:
    for kind, words in {
        "big-endian": "big-endian",
        "tensor type not read yet": "IQ2_XXS",
        "git-LFS pointer": "git lfs pull",
        "data cut short": "cut short",
    }.items():
        source = MALFORMED[kind][0]
        file = tmp_path / "m.gguf"
        file.write_bytes(source if isinstance(source, bytes) else source.build())
        with pytest.raises(CheckpointError, match=words):
            read_gguf(file)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_a_model_is_read(version: int, alignment: int, tmp_path: Path) -> None:
    gguf = REPLACE(model_gguf(), version=struct.pack("<I", version), alignment=alignment)
    gguf.keys.append(("general.alignment", U32, scalar(U32, alignment)))
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf.build())
    read = read_gguf(file)
    assert read.metadata["test.f64"] == 0.1
    assert read.metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    assert read.metadata["test.flags"] == [True, False, True]
    assert read.metadata["test.nested"] == [[1, 2], []]
    assert read.metadata["tokenizer.ggml.tokens"][-4:] == ["Ġthe", "日本", "e\u0301", ""]
    for name, dimensions, number, _, raw in gguf.tensors:
        stored = read.tensors[str(name)]
        assert stored.shape == tuple(reversed(dimensions))
        assert GGML_NUMBERS[stored.storage] == number
        view = stored.read()
        assert view.shape == read_shape(stored.storage, stored.shape)
        assert view.dtype is read_dtype(stored.storage)
        assert bytes(view.reshape(-1).view(torch.uint8).tolist()) == raw


def test_the_smallest_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(Gguf(data=b"").build())
    assert read_gguf(file).tensors == {}
    file.write_bytes(two(64).build() + NOISE)  # bytes after the data are nobody's
    assert list(read_gguf(file).tensors) == ["s", "t"]


def test_every_cut_of_a_model_is_refused(tmp_path: Path) -> None:
    raw = model_gguf().build()
    last = raw.rindex(model_gguf().tensors[-1][4]) + 8
    file = tmp_path / "m.gguf"
    for length in range(0, last, 7):
        file.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            read_gguf(file)
    file.write_bytes(raw[:last])  # the padding after the last tensor holds nothing
    assert len(read_gguf(file).tensors) == 7


@pytest.mark.parametrize("kept_bytes", [40, 120])
def test_a_header_cut_short_says_what_to_do(kept_bytes: int, tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(model_gguf().build()[:kept_bytes])
    with pytest.raises(CheckpointError, match="probably cut short, fetch it again"):
        read_gguf(file)


def test_array_items_of_a_file_are_bounded_together(tmp_path: Path) -> None:
    half = MAX_ARRAY_ITEMS // 2 + 1
    keys: list[Key] = [(k, ARRAY, head(U8, half) + bytes(half)) for k in "ab"]
    file = tmp_path / "m.gguf"
    file.write_bytes(Gguf(keys=keys).build())
    with pytest.raises(CheckpointError, match=r"'b'.*all arrays"):
        read_gguf(file)


@pytest.mark.skipif(sys.platform != "linux", reason="reads its own memory from /proc")
def test_opening_reads_no_tensor_data(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, {}, [("t", (2**21, 32), "F32", lambda: torch.zeros(2**21, 32))])
    with peak_memory_growth() as growth:
        view = read_gguf(file).tensors["t"].read()
    assert growth[0] < 2**22
    assert view.nbytes == 2**28


@pytest.mark.skipif(sys.platform != "linux", reason="reads its own memory from /proc")
def test_a_vocabulary_costs_little_more_than_its_texts(tmp_path: Path) -> None:
    tokens = [f"token {i}" for i in range(151_936)]
    file = tmp_path / "m.gguf"
    write_gguf(file, {"tokens": tokens, "types": [1] * len(tokens)}, [])
    with peak_memory_growth() as growth:
        read = read_gguf(file)
    assert read.metadata["tokens"] == tokens
    assert growth[0] < 32 * 2**20
