"""Memory-mapped files and the tensors that are views into them."""

from __future__ import annotations

import math
import mmap
import os
import sys
from pathlib import Path

import torch

from qwenkit.checkpoint.storages import read_dtype, read_shape
from qwenkit.errors import CheckpointError

# MAP_NORESERVE, which the mmap module names only from Python 3.13 on.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0


class MappedFile:
    """One file, mapped once and shared by all views of it.

    The mapping is private: nobody can change the file through a view. It is copy-on-write rather
    than read-only because writing to a read-only mapping would end the whole process, where here it
    costs the writer a private page; without reserved swap, so that a file larger than the memory
    can still be mapped.
    """

    __slots__ = ("buffer", "file", "size_bytes")

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            if not file.is_file():  # opening a pipe would wait for ever
                raise CheckpointError(file, "file", "is missing or not a regular file.")
            with file.open("rb") as opened:
                self.size_bytes = os.fstat(opened.fileno()).st_size
                if self.size_bytes == 0:
                    raise CheckpointError(file, "file", "is empty; fetch it again.")
                self.buffer = mmap.mmap(
                    opened.fileno(),
                    self.size_bytes,
                    flags=mmap.MAP_PRIVATE | _NO_RESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
        except (OSError, ValueError) as error:
            raise CheckpointError(file, "file", f"cannot be read: {error}.") from error

    def view(self, storage: str, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        """The tensor at byte `offset`, whose place in the file was checked by the caller.

        Returns `shape` in its dtype for a plain dtype, uint8 [..., bytes_per_row] for a block type.
        """
        shape, dtype = read_shape(storage, shape), read_dtype(storage)
        count = math.prod(shape) * dtype.itemsize
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        raw = torch.frombuffer(self.buffer, dtype=torch.uint8, count=count, offset=offset)
        if offset % dtype.itemsize:  # a header of odd length: kernels may not read such addresses
            raw = raw.clone()
        return raw.view(dtype).view(shape)

    def release(self) -> None:
        """Let go of the pages in memory; views stay valid, and what is read again is read from the
        file. What was written through a view is lost.
        """
        if sys.platform == "linux":  # elsewhere the same advice means something else
            self.buffer.madvise(mmap.MADV_DONTNEED)
