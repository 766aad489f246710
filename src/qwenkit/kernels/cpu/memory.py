"""Memory for large activations: in huge pages, and kept for the next layer's.

A product writes a few numbers to each of many rows, and every row of a long prompt's activations is
on another page of 4 KB: looking up pages was measured to take a third of its time. Memory that is
given back to the system and taken again costs more than the work done in it.
"""

from __future__ import annotations

import ctypes
import threading
import weakref

import torch

LARGE_BYTES = 2 << 20  # of activations, from which on they go into huge pages
_HUGE_PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14  # Linux: include/uapi/asm-generic/mman-common.h
_MOST_KEPT = 8  # pieces of one size, more than any layer has at a time

_free: dict[int, list[torch.Tensor]] = {}
_lock = threading.Lock()


def empty_rows(rows: int, columns: int) -> torch.Tensor:
    """float32 [rows, columns] of any contents."""
    size = rows * columns * 4
    if size < LARGE_BYTES:
        return torch.empty((rows, columns), dtype=torch.float32)
    size_bytes = -(-size // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    with _lock:
        kept = _free.setdefault(size_bytes, [])
        piece = kept.pop() if kept else None
    if piece is None:
        piece = _piece(size_bytes)
    buffer = (ctypes.c_char * size_bytes).from_address(_aligned(piece))
    weakref.finalize(buffer, _give_back, size_bytes, piece)
    flat = torch.frombuffer(buffer, dtype=torch.float32, count=rows * columns)
    return flat.view(rows, columns)


def _piece(size_bytes: int) -> torch.Tensor:
    piece = torch.empty(size_bytes + _HUGE_PAGE_BYTES, dtype=torch.uint8)
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:  # where there is none, and where it fails, pages stay small
        advise(ctypes.c_void_p(_aligned(piece)), ctypes.c_size_t(size_bytes), _MADV_HUGEPAGE)
    return piece


def _aligned(piece: torch.Tensor) -> int:
    return -(-piece.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES


def _give_back(size_bytes: int, piece: torch.Tensor) -> None:
    with _lock:
        kept = _free[size_bytes]
        if len(kept) < _MOST_KEPT:
            kept.append(piece)
