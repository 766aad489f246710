"""What a hub says is in a repository, and which of its files a model needs.

Names, sizes and checksums come from outside: everything that becomes part of a path is checked
here. No network, no model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenkit.checkpoint.names import HubName
from qwenkit.errors import ModelNotFoundError, NetworkError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SAFE_PATH = re.compile(r"(?:[A-Za-z0-9_][\w.+ -]*/){0,4}[A-Za-z0-9_][\w.+ -]*", re.ASCII)

# Of the files at the top of a repository: what says how a model is built, read and licensed. No
# code: a repository's Python files are never fetched, let alone run.
_DESCRIPTION = re.compile(
    r"[\w.-]+\.json|merges\.txt|[\w.-]+\.tiktoken|chat_template\.jinja|README\.md"
    r"|(?:LICENSE|NOTICE)[\w. -]*",
    re.ASCII,
)
_WEIGHT_INDEX = re.compile(r"[\w.-]+\.(?:safetensors|bin)\.index\.json", re.ASCII)
_WEIGHTS = (  # the first kind that a repository has is the one that is fetched
    re.compile(r"model[\w.-]*\.safetensors(?:\.index\.json)?", re.ASCII),
    re.compile(r"pytorch_model[\w.-]*\.bin(?:\.index\.json)?", re.ASCII),
    re.compile(r"adapter_model\.safetensors", re.ASCII),
    re.compile(r"adapter_model\.bin", re.ASCII),
)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository. `checksum` is git's SHA-1 of a blob, or the SHA-256 of a large
    file.
    """

    path: str
    size_bytes: int
    checksum: str

    def new_digest(self) -> hashlib._Hash:
        """The hash, fed with nothing of the file yet, whose hex digest must be `checksum`."""
        if len(self.checksum) == 64:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size_bytes}\0".encode(), usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit, under the name that the hub itself gives it."""

    repository: str
    commit: str
    files: tuple[RemoteFile, ...]


def read_listing(answer: Mapping[str, Any], *, source: str) -> Listing:
    """Read a hub's JSON description of a model. Raises NetworkError when it is none."""
    repository, commit, files = (answer.get(key) for key in ("id", "sha", "siblings"))
    if not isinstance(repository, str) or not _REPOSITORY.fullmatch(repository):
        raise NetworkError(f"{source} is no hub: its answer names no repository ({repository!r}).")
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise NetworkError(f"{source} is no hub: its answer names no commit ({commit!r}).")
    if not isinstance(files, list):
        raise NetworkError(f"{source} is no hub: its answer lists no files.")
    read = (_read_file(entry) for entry in files if isinstance(entry, Mapping))
    return Listing(repository, commit, tuple(f for f in read if f is not None))


def _read_file(entry: Mapping[str, Any]) -> RemoteFile | None:
    """One entry; None for what could not be kept under its name or checked."""
    large = entry.get("lfs")
    path = entry.get("rfilename")
    if isinstance(large, Mapping):
        size, checksum = large.get("size"), large.get("sha256")
    else:
        size, checksum = entry.get("size"), entry.get("blobId")
    if not isinstance(path, str) or not _SAFE_PATH.fullmatch(path):
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        return None
    if not isinstance(checksum, str) or not _CHECKSUM.fullmatch(checksum):
        return None
    return RemoteFile(path, size, checksum)


def choose_files(name: HubName, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """The files that running the model needs: safetensors, else pickles, else one GGUF.

    Raises ModelNotFoundError when there are no weights, or several GGUF files to choose from.
    """
    by_path = {f.path: f for f in files}
    ggufs = [path for path in by_path if path.endswith(".gguf")]
    if name.file is not None:
        if name.file not in ggufs:
            raise ModelNotFoundError(
                f"{name.repository} has no file {name.file!r}. {_gguf_choice(name, ggufs)}"
            )
        return [by_path[name.file]]
    for pattern in _WEIGHTS:
        weights = [f for f in files if pattern.fullmatch(f.path)]
        if any(not _WEIGHT_INDEX.fullmatch(f.path) for f in weights):
            described = [
                f
                for f in files
                if _DESCRIPTION.fullmatch(f.path) and not _WEIGHT_INDEX.fullmatch(f.path)
            ]
            return described + weights
    if len(ggufs) == 1:
        return [by_path[ggufs[0]]]
    raise ModelNotFoundError(
        f"{name.repository} has no weights at its top (model*.safetensors or pytorch_model*.bin). "
        f"{_gguf_choice(name, ggufs)}"
    )


def _gguf_choice(name: HubName, ggufs: Sequence[str]) -> str:
    if not ggufs:
        return "It has no .gguf file either."
    options = ", ".join(f"{name.repository}:{path}" for path in sorted(ggufs))
    return f"Choose one of its .gguf files: {options}."


def missing_files(folder: Path) -> list[str]:
    """Weight files that a model folder's own index names but that are not in it.

    A folder without an index needs at least one weight file.
    """
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        path = folder / index
        if not path.is_file():
            continue
        try:
            names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            return [index]
        return sorted(str(n) for n in names if not (folder / str(n)).is_file())
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return [] if weights else ["model.safetensors"]
