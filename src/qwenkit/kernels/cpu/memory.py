"""Memory in huge pages: for weights, and for large activations, which is kept for the next layer's.

A product writes a few numbers to each of many rows, and in a long prompt's activations every row is
on another page of 4 KB: looking these up was measured to take a third of its time. And memory that
is given back to the system and taken again costs more than the work done in it. Weights are read
from end to end, and looking up a page every 4 KB costs a fifth of a step.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence

import torch

LARGE_BYTES = 2 << 20  # of activations, from which on they go into huge pages
_HUGE_PAGE_BYTES = 2 << 20
_LINE_BYTES = 64
_MOST_KEPT = 4  # pieces of one size: no layer has more at a time
_SHARED_BYTES = 32 << 20  # that weights share; what is never written to takes no memory

_Buffer = ctypes.Array[ctypes.c_char]

# What several threads take and give back, one step at a time.
_shared: list[tuple[weakref.ref[_Buffer], int]] = []  # with free room: the bytes in use
_free: dict[int, list[mmap.mmap]] = {}


def empty_rows(rows: int, columns: int) -> torch.Tensor:
    """float32 [rows, columns] of any contents."""
    size = rows * columns * 4
    if size < LARGE_BYTES:
        return torch.empty((rows, columns), dtype=torch.float32)
    size_bytes = -(-size // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    try:
        piece = _free.setdefault(size_bytes, []).pop()
    except IndexError:
        piece = _new_piece(size_bytes)
    # A tensor holds on to the buffer, which goes when the last tensor over it does.
    buffer = (ctypes.c_char * len(piece)).from_buffer(piece)
    weakref.finalize(buffer, _give_back, size_bytes, piece)
    flat = torch.frombuffer(
        buffer, dtype=torch.float32, count=rows * columns, offset=_start(buffer)
    )
    return flat.view(rows, columns)


def empty_weight(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of any contents beside those made before it, for as long as any of them lives."""
    size_bytes = math.prod(shape) * dtype.itemsize
    if size_bytes > _SHARED_BYTES // 2:
        buffer, start = _new_buffer(size_bytes)
    else:
        buffer, start = _shared_buffer(size_bytes)
        end = start + -(-size_bytes // _LINE_BYTES) * _LINE_BYTES
        _shared.append((weakref.ref(buffer), end))
    flat = torch.frombuffer(buffer, dtype=torch.uint8, count=size_bytes, offset=start)
    return flat.view(dtype).view(*shape)


def _shared_buffer(size_bytes: int) -> tuple[_Buffer, int]:
    """One in which so many bytes are free, and from where on."""
    while _shared:
        kept, used = _shared.pop()
        buffer = kept()
        if buffer is not None and used + size_bytes <= len(buffer):
            return buffer, used
    return _new_buffer(_SHARED_BYTES)


def _new_buffer(size_bytes: int) -> tuple[_Buffer, int]:
    piece = _new_piece(-(-size_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES)
    buffer = (ctypes.c_char * len(piece)).from_buffer(piece)
    return buffer, _start(buffer)


def _new_piece(size_bytes: int) -> mmap.mmap:
    """So many bytes from `_start` on."""
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory has no huge pages
    piece = mmap.mmap(-1, size_bytes + _HUGE_PAGE_BYTES, flags=kind)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # where refused, pages stay small
            piece.madvise(mmap.MADV_HUGEPAGE)
    return piece


def _start(buffer: _Buffer) -> int:
    """Where the first huge page of a piece begins."""
    return -ctypes.addressof(buffer) % _HUGE_PAGE_BYTES


def _give_back(size_bytes: int, piece: mmap.mmap) -> None:
    if len(_free[size_bytes]) < _MOST_KEPT:
        _free[size_bytes].append(piece)
