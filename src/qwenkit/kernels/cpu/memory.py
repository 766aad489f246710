"""Memory for large activations: in huge pages, and kept for the next layer's.

A product writes a few numbers to each of many rows, and in a long prompt's activations every row is
on another page of 4 KB: looking these up was measured to take a third of its time. And memory that
is given back to the system and taken again costs more than the work done in it.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref

import torch

LARGE_BYTES = 2 << 20  # of activations, from which on they go into huge pages
_HUGE_PAGE_BYTES = 2 << 20
_MOST_KEPT = 4  # pieces of one size: no layer has more at a time

_free: dict[int, list[mmap.mmap]] = {}  # several threads take and give back, one step at a time


def empty_rows(rows: int, columns: int) -> torch.Tensor:
    """float32 [rows, columns] of any contents."""
    size = rows * columns * 4
    if size < LARGE_BYTES:
        return torch.empty((rows, columns), dtype=torch.float32)
    size_bytes = -(-size // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    try:
        piece = _free.setdefault(size_bytes, []).pop()
    except IndexError:
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory has no huge pages
        piece = mmap.mmap(-1, size_bytes + _HUGE_PAGE_BYTES, flags=kind)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # elsewhere pages stay small
            piece.madvise(mmap.MADV_HUGEPAGE)
    # A tensor holds on to the buffer, which goes when the last tensor over it does.
    buffer = (ctypes.c_char * len(piece)).from_buffer(piece)
    weakref.finalize(buffer, _give_back, size_bytes, piece)
    start = -ctypes.addressof(buffer) % _HUGE_PAGE_BYTES
    flat = torch.frombuffer(buffer, dtype=torch.float32, count=rows * columns, offset=start)
    return flat.view(rows, columns)


def _give_back(size_bytes: int, piece: mmap.mmap) -> None:
    if len(_free[size_bytes]) < _MOST_KEPT:
        _free[size_bytes].append(piece)
