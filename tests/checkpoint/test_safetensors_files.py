"""safetensors: every kind of malformed header is refused by name, and what is written is read."""

from __future__ import annotations

import gc
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from crafted import entry, peak_memory_growth, safetensors_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.checkpoint.safetensors import read_safetensors
from qwenkit.checkpoint.safetensors_write import write_safetensors
from qwenkit.checkpoint.sharded import read_sharded
from qwenkit.checkpoint.storages import PLAIN
from qwenkit.errors import CheckpointError, UsageError

GOOD = {"a": entry("F32", [2], 0, 8), "b": entry("U8", [3], 8, 11)}
DATA = bytes(range(11))


def changed(name: str, **changes: object) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **changes}}


def without(name: str, key: str) -> dict[str, Any]:
    return {**GOOD, name: {k: v for k, v in GOOD[name].items() if k != key}}


def raw_entry(text: str) -> str:
    """The good header as text, with the second tensor's description replaced."""
    return '{"a":' + json.dumps(GOOD["a"]) + ',"b":' + text + "}"


B = json.dumps(GOOD["b"])
MALFORMED: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "file"),
    "shorter than a length": (b"\x08\0\0", "header length"),
    "length past the end": (struct.pack("<Q", 99) + b"{}" + bytes(8), "header length"),
    "length over 100 MB": (struct.pack("<Q", 100_000_001) + b"{}", "header length"),
    "length of all ones": (b"\xff" * 8 + b"{}", "header length"),
    "length zero": (bytes(8) + b"{}", "header"),
    "starts with a space": (safetensors_bytes(" {}"), "header"),
    "starts with a byte order mark": (safetensors_bytes("\ufeff{}"), "header"),
    "a list": (safetensors_bytes("[1,2]"), "header"),
    "not UTF-8": (safetensors_bytes(b'{"\xff":1}'), "tensor name"),
    "not closed": (safetensors_bytes('{"a":'), "header"),
    "goes on after the end": (safetensors_bytes('{} {"a":1}'), "header"),
    "no comma": (safetensors_bytes(raw_entry(B + B), DATA), "header"),
    "comma too many": (safetensors_bytes(raw_entry(B + ","), DATA), "tensor name"),
    "name twice": (safetensors_bytes(raw_entry(B)[:-1] + f',"a":{B}}}', DATA), "'a'"),
    "key twice": (safetensors_bytes(raw_entry('{"shape":[3],' + B[1:]), DATA), "'b'"),
    "dtype twice": (safetensors_bytes(raw_entry('{"dtype":"U8",' + B[1:]), DATA), "'b'"),
    "unknown key": (safetensors_bytes(changed("b", stride=1), DATA), "'b'"),
    "dtype missing": (safetensors_bytes(without("b", "dtype"), DATA), "'b'"),
    "shape missing": (safetensors_bytes(without("b", "shape"), DATA), "'b'"),
    "offsets missing": (safetensors_bytes(without("b", "data_offsets"), DATA), "'b'"),
    "dtype unknown": (safetensors_bytes(changed("b", dtype="U9"), DATA), "'b'"),
    "dtype a number": (safetensors_bytes(changed("b", dtype=8), DATA), "'b'"),
    "entry a list": (safetensors_bytes(changed("a") | {"b": []}, DATA), "header"),
    "shape a number": (safetensors_bytes(changed("b", shape=3), DATA), "'b'"),
    "dimension negative": (safetensors_bytes(changed("b", shape=[-3]), DATA), "'b'"),
    "dimension a fraction": (safetensors_bytes(changed("b", shape=[3.0]), DATA), "'b'"),
    "dimension null": (safetensors_bytes(changed("b", shape=[None]), DATA), "'b'"),
    "dimension with a leading zero": (
        safetensors_bytes(raw_entry(B.replace("[3]", "[03]")), DATA),
        "'b'",
    ),
    "dimension of 5,000 digits": (
        safetensors_bytes(raw_entry(B.replace("[3]", f"[{'9' * 5000}]")), DATA),
        "'b'",
    ),
    "65 dimensions": (safetensors_bytes(changed("b", shape=[1] * 64 + [3]), DATA), "'b'"),
    "2^63": (safetensors_bytes(changed("b", shape=[2**63]), DATA), "'b'"),
    "product is 3 modulo 2^64": (safetensors_bytes(changed("b", shape=[2**63, 2, 3]), DATA), "'b'"),
    "product is 0 modulo 2^64": (
        safetensors_bytes({"a": entry("U8", [2**32, 2**32], 0, 0)}),
        "'a'",
    ),
    "empty but huge": (safetensors_bytes({"a": entry("F32", [0, 2**62, 2**62], 0, 0)}), "'a'"),
    "shape larger than its bytes": (safetensors_bytes(changed("b", shape=[4]), DATA), "'b'"),
    "dtype wider than its bytes": (safetensors_bytes(changed("b", dtype="F32"), DATA), "'b'"),
    "offsets backwards": (safetensors_bytes(changed("b", data_offsets=[11, 8]), DATA), "'b'"),
    "one offset": (safetensors_bytes(changed("b", data_offsets=[8]), DATA), "'b'"),
    "three offsets": (safetensors_bytes(changed("b", data_offsets=[8, 9, 11]), DATA), "'b'"),
    "overlap": (safetensors_bytes(changed("b", data_offsets=[7, 10]), DATA), "'b'"),
    "the same bytes twice": (safetensors_bytes(changed("b", data_offsets=[0, 3]), DATA), "'a'"),
    "hole": (safetensors_bytes(changed("b", data_offsets=[9, 12]), DATA + b"x"), "'b'"),
    "hole at the start": (safetensors_bytes({"b": GOOD["b"]}, DATA), "'b'"),
    "trailing bytes": (safetensors_bytes(GOOD, DATA + b"x"), "data"),
    "bytes missing": (safetensors_bytes(GOOD, DATA[:-1]), "data"),
    "no tensor but bytes": (safetensors_bytes({}, DATA), "data"),
    "metadata a list": (safetensors_bytes({**GOOD, "__metadata__": []}, DATA), "header"),
    "metadata not text": (
        safetensors_bytes({**GOOD, "__metadata__": {"x": 1}}, DATA),
        "__metadata__",
    ),
    "metadata nested": (safetensors_bytes({"__metadata__": {"x": {}}}), "__metadata__"),
    "metadata twice": (
        safetensors_bytes('{"__metadata__":{},"__metadata__":{}}'),
        "'__metadata__'",
    ),
    "metadata key twice": (
        safetensors_bytes('{"__metadata__":{"x":"1","x":"2"}}'),
        "__metadata__",
    ),
    "half a surrogate": (safetensors_bytes('{"\\ud800":' + B + "}", DATA), "tensor name"),
    "unknown escape": (safetensors_bytes('{"\\q":' + B + "}", DATA), "tensor name"),
    "line break in a name": (safetensors_bytes('{"a\nb":' + B + "}", DATA), "tensor name"),
    "infinity": (safetensors_bytes(raw_entry("Infinity"), DATA), "header"),
    "objects 100,000 deep": (safetensors_bytes('{"a":' * 100_000), "'a'"),
    "lists 100,000 deep": (
        safetensors_bytes('{"a":{"shape":' + "[" * 100_000),
        "'a'",
    ),
    "metadata 100,000 deep": (
        safetensors_bytes('{"__metadata__":' + '{"a":' * 100_000),
        "__metadata__",
    ),
    "git-LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "content",
    ),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_header_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    raw, field = MALFORMED[kind]
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(file)
    assert (caught.value.file, caught.value.field) == (str(file), field)
    assert len(str(caught.value)) < 1000


def test_the_good_header_of_these_cases_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for header in (GOOD, raw_entry(B), json.dumps(GOOD, indent=4) + "\n\t "):
        file.write_bytes(safetensors_bytes(header, DATA))
        tensors = read_safetensors(file)
        assert tensors["b"].read().tolist() == [8, 9, 10]
        assert tensors["a"].read().view(torch.uint8).tolist() == list(range(8))


@pytest.mark.skipif(sys.platform != "linux", reason="reads its own memory from /proc")
@pytest.mark.parametrize("filler", [b"[0", b"[", b'"a":', b'{"":', b",0", b" ", b'"'])
def test_a_large_hostile_header_costs_little_more_than_its_size(
    filler: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    size = 20_000_000
    file.write_bytes(safetensors_bytes(b'{"a":{"shape":[0' + filler * (size // len(filler))))
    with peak_memory_growth() as growth, pytest.raises(CheckpointError):
        read_safetensors(file)
    assert growth[0] <= size + 64 * 2**20


def test_views_never_change_the_file_and_outlive_everything_else(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"x": torch.arange(8.0)})
    before = file.read_bytes()
    view = read_safetensors(file)["x"].read()
    gc.collect()
    view += 1
    assert view.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert file.read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads its own memory from /proc")
def test_opening_reads_no_tensor_data(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"x": torch.ones(64, 2**20)})
    with peak_memory_growth() as growth:
        stored = read_safetensors(file)["x"]
        view = stored.read()
    assert growth[0] < 2**22
    assert stored.size_bytes == view.nbytes == 2**28


def test_data_at_an_odd_address_are_aligned_on_reading(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    header = json.dumps({"x": entry("F32", [2], 0, 8)})
    header += " " * (1 - len(header) % 8)
    file.write_bytes(safetensors_bytes(header, struct.pack("<2f", 1.5, -2.0)))
    tensor = read_safetensors(file)["x"].read()
    assert tensor.tolist() == [1.5, -2.0]
    assert tensor.data_ptr() % 4 == 0


DTYPES = list(PLAIN.values())
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype, any small shape, any bits; sometimes not contiguous."""
    shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    raw = list(draw(st.binary(min_size=size, max_size=size)))
    if dtype is torch.bool:
        raw = [byte % 2 for byte in raw]
    tensor = torch.tensor(raw, dtype=torch.uint8).view(dtype).reshape(shape)
    turned: bool = draw(st.booleans())
    return tensor.transpose(0, -1) if shape and turned else tensor


def bits(tensor: torch.Tensor) -> tuple[object, ...]:
    """Everything about a tensor: NaN equals itself."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
    return tensor.dtype, tuple(tensor.shape), raw


@settings(max_examples=60, deadline=None)
@given(given_tensors=st.dictionaries(NAMES, tensors(), max_size=6), shard_bytes=st.integers(1, 200))
def test_what_is_written_is_read_and_read_equal_by_the_library(
    given_tensors: dict[str, torch.Tensor],
    shard_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.mktemp("round") / "model.safetensors"
    files = write_safetensors(file, given_tensors, shard_bytes=shard_bytes)
    read = read_safetensors(file) if files == [file] else read_sharded(files[-1], read_safetensors)
    assert {n: bits(t.read()) for n, t in read.items()} == {
        n: bits(t) for n, t in given_tensors.items()
    }
    theirs: dict[str, torch.Tensor] = {}
    for shard in (f for f in files if f.suffix == ".safetensors"):
        theirs |= safetensors.torch.load_file(shard)
    assert {n: bits(t) for n, t in theirs.items()} == {n: bits(t) for n, t in given_tensors.items()}


@settings(max_examples=30, deadline=None)
@given(given_tensors=st.dictionaries(NAMES, tensors(), min_size=1, max_size=6))
def test_what_the_library_writes_is_read_equal(
    given_tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("theirs") / "model.safetensors"
    safetensors.torch.save_file({n: t.contiguous() for n, t in given_tensors.items()}, file)
    ours = read_safetensors(file)
    assert {n: bits(t.read()) for n, t in ours.items()} == {
        n: bits(t) for n, t in given_tensors.items()
    }


def test_shards_are_cut_by_size_and_a_large_tensor_stands_alone(tmp_path: Path) -> None:
    given_tensors = {
        n: torch.zeros(s, dtype=torch.uint8) for n, s in zip("abcd", (6, 4, 30, 5), strict=True)
    }
    files = write_safetensors(tmp_path / "model.safetensors", given_tensors, shard_bytes=10)
    assert [f.name for f in files] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads(files[-1].read_text())
    assert index["metadata"] == {"total_size": 45}
    assert index["weight_map"] == {
        "a": files[0].name,
        "b": files[0].name,
        "c": files[1].name,
        "d": files[2].name,
    }


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"x": torch.ones(3)})
    before = file.read_bytes()

    class Failing(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(file, Failing(x=torch.zeros(3)))
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_sharded_write_replaces_the_single_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"x": torch.ones(3)})
    write_safetensors(file, {"x": torch.zeros(3), "y": torch.zeros(3)}, shard_bytes=12)
    assert not file.exists()


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for given_tensors in (
        {"x": torch.ones(2, dtype=torch.complex64)},
        {"x": torch.eye(2).to_sparse()},
        {"__metadata__": torch.ones(1)},
        {"\ud800": torch.ones(1)},
    ):
        with pytest.raises(UsageError):
            write_safetensors(file, given_tensors)
    with pytest.raises(UsageError, match=r"\.safetensors"):
        write_safetensors(tmp_path / "model.bin", {})
    with pytest.raises(UsageError, match="metadata"):
        write_safetensors(file, {}, metadata={"x": 1})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="write"):
        write_safetensors(tmp_path / "nowhere" / "model.safetensors", {})
    assert list(tmp_path.iterdir()) == []
