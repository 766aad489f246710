"""The cache of hub repositories, laid out as huggingface_hub documents it ("Understand caching").

Blobs are named by their checksum, snapshots are folders of links to them, refs name the commit of a
branch. Other programs find here what we downloaded, and the other way round. No network.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwenkit.checkpoint.names import HubName
from qwenkit.checkpoint.progress import Progress, ProgressCallback
from qwenkit.checkpoint.repository import RemoteFile, missing_files

_BLOCK_BYTES = 1 << 20


def repository_folder(name: HubName, cache: Path) -> Path:
    """Where the cache keeps everything of one repository."""
    return cache / f"models--{name.organisation}--{name.name}"


def repository_name(snapshot: Path) -> str | None:
    """`organisation/name` of a snapshot's folder, whose own name is only a commit or a revision, in
    this cache or in ModelScope's; None for other folders.
    """
    match = re.fullmatch(r"(?:models--)?([^-].*?)--(.+)", snapshot.parent.parent.name)
    return f"{match[1]}/{match[2]}" if match and snapshot.parent.name == "snapshots" else None


def cached_snapshot(name: HubName, revision: str, cache: Path) -> Path | None:
    """The snapshot, or the one GGUF file, that the cache holds whole; None if it does not."""
    folder = repository_folder(name, cache)
    reference = folder / "refs" / revision
    commit = revision
    if reference.is_file():
        commit = reference.read_text(encoding="utf-8").strip()
    snapshot = folder / "snapshots" / commit
    if not re.fullmatch(r"[0-9a-f]{40}", commit) or not snapshot.is_dir():
        return None
    if name.file is not None:
        file = snapshot / name.file
        return file if file.is_file() else None
    if any((snapshot / f).is_file() for f in ("config.json", "adapter_config.json")):
        return None if missing_files(snapshot) else snapshot
    files = list(snapshot.rglob("*.gguf"))
    return files[0] if len(files) == 1 else None


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the repository's lock: a second download of it waits, then finds everything there."""
    with (folder / ".qwenkit.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def link_snapshot(folder: Path, commit: str, revision: str, files: Sequence[RemoteFile]) -> Path:
    """Make the snapshot's links, then its ref: whoever finds the ref finds every file."""
    snapshot = folder / "snapshots" / commit
    for file in files:
        link = snapshot / file.path
        link.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(folder / "blobs" / file.checksum, link.parent)
        if not (link.is_symlink() and os.readlink(link) == target):
            link.unlink(missing_ok=True)
            link.symlink_to(target)
    reference = folder / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    draft = reference.with_name(f".{reference.name}.{os.getpid()}")
    draft.write_text(commit, encoding="utf-8")
    draft.replace(reference)
    return snapshot


def bytes_of(path: Path) -> int:
    """A file's size; 0 when it is not there."""
    return path.stat().st_size if path.is_file() else 0


def matches(path: Path, file: RemoteFile, progress: ProgressCallback | None) -> bool:
    """True when a local file has the announced size and checksum."""
    if bytes_of(path) != file.size_bytes:
        return False
    digest = file.new_digest()
    done = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            if progress is not None:
                progress(Progress(f"checking {file.path}", done, file.size_bytes))
    return digest.hexdigest() == file.checksum
