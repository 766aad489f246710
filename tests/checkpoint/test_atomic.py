"""Writing of whole files: what a name may stand for when a file takes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwenkit.checkpoint.atomic import replacing
from qwenkit.errors import CheckpointError


def write(path: Path, *, fail: bool = False) -> None:
    with replacing(path) as file:
        file.write(b"new")
        if fail:
            raise ZeroDivisionError


def test_a_file_is_replaced_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        write(path, fail=True)
    assert path.read_bytes() == b"old"
    write(path)
    assert path.read_bytes() == b"new"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "no name"])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, kind: str, linked: bool) -> None:
    target = {"device": Path("/dev/null"), "no name": Path("/")}.get(kind, tmp_path / "target")
    if kind == "folder":
        target.mkdir()
    elif kind == "pipe":
        os.mkfifo(target)
    path = target
    if linked:
        path = tmp_path / "link"
        path.symlink_to(target)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="write: is no regular file; give another name"):
        write(path)
    assert sorted(tmp_path.iterdir()) == before
    assert path.is_symlink() == linked


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path, there: bool) -> None:
    target, path = tmp_path / "target", tmp_path / "link"
    if there:
        target.write_bytes(b"old")
    path.symlink_to(target)
    write(path)
    assert not path.is_symlink()
    assert path.read_bytes() == b"new"
    assert target.exists() == there
    assert not there or target.read_bytes() == b"old"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone/file: write: failed: No such file"):
        write(tmp_path / "gone" / "file")
