"""Row 3 of the reliability board: a `.bin` gives tensors or is refused; nothing in it ever runs."""

from __future__ import annotations

import code
import collections
import contextlib
import functools
import importlib
import io
import operator
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import tarfile
import timeit
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crafted import peak_memory_growth

from qwenkit.checkpoint.torch_bin import read_torch_bin
from qwenkit.errors import CheckpointError

MEMORY_BYTES = 256 * 2**20
LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
LEGACY_HEAD = LEGACY_MAGIC + pickle.dumps(1001, protocol=2) + pickle.dumps({}, protocol=2)


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments

    def __call__(self) -> None:
        """Only to look callable: the pickler insists that a function is one."""


class State(Call):
    """Pickles as an empty dictionary that is then given `arguments[0]` as its state."""

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, (), self.arguments[0]


def dumps(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol=protocol)


def code_payloads(canary: str, evil_file: str) -> dict[str, bytes]:
    """Pickles that make the file `canary` when they are believed. `evil_file` holds one itself."""
    touch = f"touch {canary}"
    source = f"open({canary!r}, 'w').close()"
    compiled = f"compile({source!r}, '', 'exec')"
    system = Call(os.system, touch)
    trusting_load = functools.partial(torch.load, weights_only=False)
    walk = Call(getattr, Call(importlib.import_module, "os"), "system")
    shell = Call(getattr, Call(code.InteractiveInterpreter), "runsource")
    old_style = f"S'{touch}'\n".encode()
    return {
        "system": dumps(system),
        "system, protocol 0": dumps(system, 0),
        "system, protocol 5": dumps(system, 5),
        "system by instance opcode": b"(" + old_style + b"ios\nsystem\n.",
        "system by object opcode": b"(cos\nsystem\n" + old_style + b"o.",
        "subprocess": dumps(Call(subprocess.check_output, ["touch", canary])),
        "getoutput": dumps(Call(subprocess.getoutput, touch)),
        "eval": dumps(Call(eval, source)),
        "exec": dumps(Call(exec, source)),
        "mkdir": dumps(Call(os.mkdir, canary)),
        "copy": dumps(Call(shutil.copy, os.devnull, canary)),
        "Path.touch": dumps(Call(Path.touch, Path(canary))),
        "getattr chain": dumps(Call(walk, touch)),
        "getattr twice": dumps(Call(Call(getattr, walk, "__call__"), touch)),
        "timeit": dumps(Call(timeit.timeit, source, "pass", timeit.default_timer, 1)),
        "runpy": dumps(Call(runpy._run_code, Call(eval, compiled), {})),  # type: ignore[attr-defined]
        "interpreter": dumps(Call(shell, source)),
        "methodcaller": dumps(Call(Call(operator.methodcaller, "touch"), Path(canary))),
        "map": dumps(Call(list, Call(map, os.system, [touch]))),
        "pickle in a pickle": dumps(Call(pickle.loads, dumps(system))),
        "torch.load in a pickle": dumps(Call(trusting_load, evil_file)),
        "in a state dict": dumps({"a": torch.Size([1]), "b": system}),
        "as a key": dumps({system: 1}),
        "as a state": dumps(State(collections.OrderedDict, {"x": system})),
    }


NAMES = sorted(code_payloads("x", "y"))


def zip_file(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip as torch.save lays it out, with the members given."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", compression, compresslevel=1) as archive:
        for name, content in members:
            archive.writestr(f"archive/{name}", content)
        archive.writestr("archive/version", b"3\n")
    return raw.getvalue()


def legacy_file(pickled: bytes, keys: list[str] | None = None, data: bytes = b"") -> bytes:
    """The layout before PyTorch 1.6: five pickles, then the storages."""
    return LEGACY_HEAD + pickled + dumps(keys or []) + data


def containers(payload: bytes, system_payload: bytes) -> dict[str, bytes]:
    """The payload at every place from which a loader might read a pickle."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    empty = dumps({})
    return {
        "zip": zip_file(("data.pkl", payload)),
        "legacy": legacy_file(payload),
        "legacy, system info": LEGACY_MAGIC + dumps(1001) + payload + empty + dumps([]),
        "legacy, version": LEGACY_MAGIC + payload + dumps({}) + empty + dumps([]),
        "legacy, keys": LEGACY_HEAD + empty + payload,
        "before the magic": payload + LEGACY_HEAD + empty + dumps([]),
        "bare": payload,
        "tar": tar.getvalue(),
        "zip in a zip": zip_file(("data.pkl", zip_file(("data.pkl", payload)))),
        "two pickles in a zip": zip_file(("data.pkl", empty), ("x/data.pkl", payload)),
        "TorchScript": zip_file(
            ("data.pkl", payload), ("constants.pkl", payload), ("code/x.py", b"")
        ),
        "zip behind a pickle": payload + zip_file(("data.pkl", system_payload)),
    }


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_a_pickle_runs(name: str, tmp_path: Path) -> None:
    canary, evil = tmp_path / "canary", tmp_path / "evil"
    payloads = code_payloads(str(canary), str(evil))
    evil.write_bytes(payloads["system"])
    with contextlib.suppress(Exception):  # believed, it runs: the test can fail
        pickle.loads(payloads[name])
    assert canary.exists()
    canary.rmdir() if canary.is_dir() else canary.unlink()
    file = tmp_path / "pytorch_model.bin"
    for place, raw in containers(payloads[name], payloads["system"]).items():
        file.write_bytes(raw)
        with pytest.raises(CheckpointError) as caught:
            read_torch_bin(file)
        assert not canary.exists(), place
        assert caught.value.file == str(file)
        assert "weights_only=False" not in str(caught.value)  # torch's own advice is not passed on


class Storage:
    """Stands for a storage of `count` float32 in a crafted pickle."""

    def __init__(self, count: int, key: str = "0") -> None:
        self.saved_id = ("storage", torch.FloatStorage, key, "cpu", count)


class Pickler(pickle.Pickler):
    legacy = False

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Storage):
            return None
        return (*value.saved_id, None) if self.legacy else value.saved_id


def tensor_pickle(
    count: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    *,
    offset: int = 0,
    legacy: bool = False,
) -> bytes:
    """{"x": a tensor of that shape in a storage of `count` float32}."""
    raw = io.BytesIO()
    pickler = Pickler(raw, 2)
    pickler.legacy = legacy
    rebuild = torch._utils._rebuild_tensor_v2
    hooks: Any = collections.OrderedDict()
    pickler.dump({"x": Call(rebuild, Storage(count), offset, shape, stride, False, hooks)})
    return raw.getvalue()


def with_storage(pickled: bytes, size: int = 16) -> bytes:
    return zip_file(("data.pkl", pickled), ("data/0", bytes(size)), ("byteorder", b"little"))


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"(" * depth + b"t" * depth + b"."


def encrypted() -> bytes:
    raw = bytearray(zip_file(("data.pkl", dumps({}))))
    for start in (raw.index(b"PK\x03\x04") + 6, raw.index(b"PK\x01\x02") + 8):
        raw[start] |= 1
    return bytes(raw)


def hostile_files() -> Iterator[tuple[str, bytes]]:
    """Files that carry no code, but ask for memory, time or trust."""
    yield "empty", b""
    yield "text", b"hello"
    yield "no pickle in the zip", zip_file(("other", b""))
    yield "zip cut short", with_storage(tensor_pickle(4, (4,), (1,)))[:-30]
    yield "legacy cut short", legacy_file(tensor_pickle(4, (4,), (1,), legacy=True))[:-20]
    yield "2^40 numbers", with_storage(tensor_pickle(2**40, (2**40,), (1,)))
    yield (
        "2^40 numbers, legacy",
        legacy_file(tensor_pickle(2**40, (2**40,), (1,), legacy=True), ["0"]),
    )
    yield (
        "2^31 numbers, legacy",
        legacy_file(tensor_pickle(2**31, (2**31,), (1,), legacy=True), ["0"]),
    )
    yield "negative count", with_storage(tensor_pickle(-4, (4,), (1,)))
    yield "more than is stored", with_storage(tensor_pickle(4, (2**20,), (1,)))
    yield "past its storage", with_storage(tensor_pickle(4, (4,), (1,), offset=2**40))
    yield "one number 2^40 times", with_storage(tensor_pickle(4, (2**20, 2**20), (0, 0)))
    yield "one number 2^80 times", with_storage(tensor_pickle(4, (2**40, 2**40), (0, 0)))
    yield "backwards", with_storage(tensor_pickle(4, (4,), (-1,), offset=3))
    yield (
        "compressed pickle",
        zip_file(("data.pkl", bytes(2**28)), compression=zipfile.ZIP_DEFLATED),
    )
    bomb = (("data.pkl", tensor_pickle(2**26, (2**26,), (1,))), ("data/0", bytes(2**28)))
    yield "compressed storage", zip_file(*bomb, compression=zipfile.ZIP_DEFLATED)
    yield "encrypted", encrypted()
    yield "bytes of 2^60", zip_file(("data.pkl", b"\x80\x04\x8e" + (2**60).to_bytes(8, "little")))
    yield "50,000 deep", zip_file(("data.pkl", nested(50_000)))
    yield "a list", zip_file(("data.pkl", dumps([1, 2])))
    yield "a number", zip_file(("data.pkl", dumps({"x": 3})))
    yield "a nested dictionary", zip_file(("data.pkl", dumps({"model": {"x": 3}})))


@pytest.mark.skipif(sys.platform != "linux", reason="reads its own memory from /proc")
def test_hostile_files_are_refused_in_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    for name, raw in hostile_files():
        file.write_bytes(raw)
        del raw
        with peak_memory_growth() as growth, pytest.raises(CheckpointError) as caught:
            read_torch_bin(file)
        assert growth[0] <= MEMORY_BYTES, name
        assert len(str(caught.value)) < 1000, name


def test_the_crafted_tensor_is_read_when_nothing_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(with_storage(tensor_pickle(4, (2, 2), (1, 2))))
    assert read_torch_bin(file)["x"].read().tolist() == [[0.0, 0.0], [0.0, 0.0]]
    data = (4).to_bytes(8, "little") + bytes(16)
    file.write_bytes(legacy_file(tensor_pickle(4, (4,), (1,), legacy=True), ["0"], data))
    assert read_torch_bin(file)["x"].read().tolist() == [0.0] * 4


def test_a_storage_that_the_file_does_not_fill_is_zero(tmp_path: Path) -> None:
    """The pickle alone decides how much memory is allotted; old memory must not show in it."""
    file = tmp_path / "pytorch_model.bin"
    count = 5000
    dirty = [torch.full((count,), 7.0) for _ in range(50)]  # memory of this process, freed again
    del dirty
    pickled = tensor_pickle(count, (count,), (1,), legacy=True)
    file.write_bytes(legacy_file(pickled, [], bytes(4 * count)))
    assert not read_torch_bin(file)["x"].read().any()


@pytest.mark.parametrize("new_layout", [True, False])
def test_tensors_are_read(new_layout: bool, tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    saved = {
        "base": base,
        "turned": base.T,
        "part": base[1:3, 2:],
        "parameter": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "one": torch.tensor(7),
        "none": torch.empty(0, 5),
        "flags": torch.tensor([True, False]),
    }
    file = tmp_path / "pytorch_model.bin"
    torch.save(saved, file, _use_new_zipfile_serialization=new_layout)
    read = read_torch_bin(file)
    assert list(read) == list(saved)
    for name, tensor in saved.items():
        view = read[name].read()
        assert torch.equal(view, tensor)
        assert view.is_contiguous()
        assert not view.requires_grad
        assert read[name].shape == tuple(tensor.shape)
        assert read[name].size_bytes == tensor.nbytes
    assert read["parameter"].storage == "BF16"


@pytest.mark.skipif(sys.platform != "linux", reason="reads its own memory from /proc")
def test_opening_reads_no_tensor_data(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.ones(2**24)}, file)
    read_torch_bin(file)  # what torch imports on first use is not counted
    with peak_memory_growth() as growth:
        stored = read_torch_bin(file)["x"]
    assert growth[0] < 2**22
    assert stored.read()[-1] == 1


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (torch.eye(2).to_sparse(), "'x'"),
        (torch.ones(2, dtype=torch.complex64), "'x'"),
        (torch.empty(2, device="meta"), "'x'"),
        ("text", "'x'"),
    ],
)
def test_what_is_no_plain_tensor_is_named(value: Any, field: str, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"x": value}, file)
    with pytest.raises(CheckpointError) as caught:
        read_torch_bin(file)
    assert caught.value.field == field


def test_the_function_that_was_asked_for_is_named(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(zip_file(("data.pkl", dumps(Call(os.system, "true")))))
    with pytest.raises(CheckpointError, match=r"posix\.system.*never run.*safetensors"):
        read_torch_bin(file)


def test_an_old_torch_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.ones(2)}, file)
    for version, trusted in (("2.9.1+cpu", False), ("2.10.0", True), ("3.0", True)):
        monkeypatch.setattr(torch, "__version__", version)
        if trusted:
            assert list(read_torch_bin(file)) == ["x"]
        else:
            with pytest.raises(CheckpointError, match=r"2\.10"):
                read_torch_bin(file)
