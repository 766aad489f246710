"""Writing of whole files: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qwenkit.errors import CheckpointError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the block ends without an error.

    It is written beside `path`, flushed to the disk, then renamed; after an error nothing of it
    stays. A link is replaced itself and what it points to left alone: in a hub's cache that is
    shared. Raises CheckpointError when the disk refuses (full, read-only, no such folder), and for
    what is there and is no regular file, be it through a link: a folder, a device, a pipe.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(path, "write", "is no regular file; give another name.")
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # an interrupt, too, must not leave gigabytes behind
            temporary.unlink(missing_ok=True)
            raise
        _flush_folder(path.parent)
    except OSError as error:
        raise CheckpointError(path, "write", f"failed: {error.strerror or error}.") from error


def _flush_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
