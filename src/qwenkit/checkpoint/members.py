"""Files of a model folder: found by bare name only, never outside the folder, and read as text or
JSON with every failure named.

A name that comes out of a file (a shard index) is untrusted. It must be a bare file name, and the
file must really lie inside the folder. One exception: a folder of the hub's cache
(`…/snapshots/<revision>/`) holds links into `…/blobs/` beside it, which are followed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwenkit.errors import CheckpointError

MAX_TEXT_BYTES = 100_000_000  # the longest JSON or text file that is read, as in safetensors
_LFS_START = b"version https://git-lfs.github.com/spec/"


def clip(value: object, limit: int = 80) -> str:
    """`value` quoted for an error message, cut when a hostile file made it long."""
    if not isinstance(value, str | int | float | None):
        return f"a {type(value).__name__}"
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit + 2 else text[:limit] + "…'"


def member(folder: Path, name: object, *, source: Path | None = None) -> Path | None:
    """The file `name` of `folder`; None when there is none.

    `source` is the file that mentions the name, for the message. Raises CheckpointError when the
    name is not a bare file name, or leads out of the folder.
    """
    source = folder if source is None else source
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0:"):
        raise CheckpointError(
            source, clip(name), "is not a plain file name; files must lie in the folder itself."
        )
    path = folder / name
    try:
        if not path.exists():
            if path.is_symlink():
                raise CheckpointError(path, "link", "points nowhere; fetch the file again.")
            return None
        target, base = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # name too long, link loop, lone surrogate
        raise CheckpointError(source, clip(name), f"cannot be opened: {_reason(error)}.") from error
    if not any(target.is_relative_to(root) for root in _roots(base)):
        raise CheckpointError(
            path, "link", "leads out of the model folder; put the file itself there, or open the "
            "folder that holds it."
        )  # fmt: skip
    return path if target.is_file() else None


def _roots(base: Path) -> list[Path]:
    """Where files of the folder may really lie: in it, or in its own hub cache."""
    if base.parent.name == "snapshots":
        return [base, base.parent.parent / "blobs"]
    return [base]


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__


def refuse_lfs_pointer(file: Path) -> None:
    """Raise CheckpointError when `file` is git-LFS's note about a file instead of the file.

    Raises CheckpointError too when it cannot be read.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(200)
    except OSError as error:
        raise CheckpointError(file, "file", f"cannot be read: {_reason(error)}.") from error
    if start.startswith(_LFS_START):
        raise CheckpointError(
            file,
            "content",
            "is a git-LFS pointer, not the file itself: the repository was cloned without its "
            "large files. Run `git lfs install && git lfs pull` in the folder, or download the "
            "model with `qwenkit pull`.",
        )


def read_text(file: Path) -> str:
    """A whole UTF-8 text. Raises CheckpointError."""
    refuse_lfs_pointer(file)
    try:
        if file.stat().st_size > MAX_TEXT_BYTES:
            raise CheckpointError(file, "size", f"is over {MAX_TEXT_BYTES:,} bytes.")
        return file.read_text("utf-8")
    except OSError as error:
        raise CheckpointError(file, "file", f"cannot be read: {_reason(error)}.") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(file, f"byte {error.start}", "is not UTF-8 text.") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file and the place."""
    text = read_text(file)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise CheckpointError(file, place, f"is not JSON: {error.msg}.") from error
    except RecursionError as error:
        raise CheckpointError(file, "JSON", "is nested too deeply.") from error
    except ValueError as error:  # a number of thousands of digits
        raise CheckpointError(file, "JSON", f"cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(file, "JSON", f"expected an object, got {type(value).__name__}.")
    return value
