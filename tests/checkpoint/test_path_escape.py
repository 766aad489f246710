"""Row 4 of the reliability board: no name inside a file leads out of the model folder.

Every opening of a file is watched by the interpreter's own audit hook.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit.checkpoint import open_checkpoint, write_safetensors
from qwenkit.errors import CheckpointError

_watch: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch is None:
        return
    if event == "open" and isinstance(arguments[0], str | bytes):
        _watch.append(os.fsdecode(arguments[0]))
    elif event in ("socket.connect", "socket.getaddrinfo", "urllib.Request", "os.system"):
        _watch.append(event)


@contextmanager
def watched() -> Iterator[list[str]]:
    """Collects what is opened or connected to inside the block."""
    global _watch
    if not getattr(sys, "_checkpoint_audit", False):
        sys.addaudithook(_audit)  # a hook can never be taken away again
        sys._checkpoint_audit = True  # type: ignore[attr-defined]
    seen: list[str] = []
    _watch = seen
    try:
        yield seen
    finally:
        _watch = None


OUTSIDE = "OUTSIDE"  # stands for the absolute path of a real shard that lies elsewhere
NAMES: list[Any] = [
    OUTSIDE,
    "../outside/model.safetensors",
    "./../outside/model.safetensors",
    "sub/../../outside/model.safetensors",
    "..",
    ".",
    "",
    "/",
    "//",
    "/etc/passwd",
    "/proc/self/environ",
    "/dev/zero",
    "../" * 40 + "etc/passwd",
    "..\\outside\\model.safetensors",
    "C:\\outside\\model.safetensors",
    "C:model.safetensors",
    "\\\\host\\share\\model.safetensors",
    "//host/share/model.safetensors",
    "sub/model.safetensors",
    "./model-00001-of-00002.safetensors",
    "sub//model.safetensors",
    "~/model.safetensors",
    "file:///etc/passwd",
    "file:model.safetensors",
    "http://169.254.169.254/latest/meta-data",
    "https://example.com/model.safetensors",
    "model.safetensors\0",
    "\0",
    "\0../outside/model.safetensors",
    "model.safetensors/",
    "..%2foutside%2fmodel.safetensors",
    "%2e%2e",
    "．．／outside",
    "link.safetensors",
    "link-absolute.safetensors",
    "link-folder/model.safetensors",
    "link-loop.safetensors",
    "folder.safetensors",
    "pipe.safetensors",
    "x" * 5000,
    "\ud800.safetensors",
    "$HOME/model.safetensors",
    "*.safetensors",
    " ",
    3,
    None,
    True,
    ["model.safetensors"],
    {"file": "model.safetensors"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder beside another one that must never be opened."""
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    for place in (outside, folder / "sub"):
        write_safetensors(place / "model.safetensors", {"x": torch.ones(2)})
    (folder / "config.json").write_text("{}")
    (folder / "link.safetensors").symlink_to("../outside/model.safetensors")
    (folder / "link-absolute.safetensors").symlink_to(outside / "model.safetensors")
    (folder / "link-folder").symlink_to(outside)
    (folder / "link-loop.safetensors").symlink_to("link-loop.safetensors")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    return folder


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:40])
@pytest.mark.parametrize("index", ["model.safetensors", "pytorch_model.bin"])
def test_names_in_an_index_stay_in_the_folder(index: str, name: Any, folder: Path) -> None:
    if name == OUTSIDE:
        name = str(folder.parent / "outside" / "model.safetensors")
    (folder / f"{index}.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with watched() as seen, pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert seen == [str(folder / f"{index}.index.json")] * 2  # its first bytes, then all of it
    assert caught.value.file.startswith(str(folder))
    assert len(str(caught.value)) < 1000


def test_the_watch_sees_what_is_opened(folder: Path) -> None:
    name = "real.safetensors"
    (folder / name).write_bytes((folder.parent / "outside" / "model.safetensors").read_bytes())
    index = {"weight_map": {"x": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with watched() as seen:
        assert open_checkpoint(folder).tensors["x"].read().tolist() == [1.0, 1.0]
    assert str(folder / name) in seen
