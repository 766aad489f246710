"""Stored rows to panels of sixteen: what every packed weight is made by when it is loaded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from qwenkit.kernels.registry import Arguments, Op

PANEL_ROWS = 16


def _reference(rows: torch.Tensor, head: int, body: int, flip: int) -> torch.Tensor:
    """rows uint8 [rows, blocks * (head + body)] to [panels, blocks * body * 16]: of each block the
    last `body` bytes, a multiple of four, every bit of `flip` turned over; words of four bytes of
    sixteen rows lie side by side. Rows that a last panel lacks are zeros.
    """
    blocks = rows.reshape(len(rows), -1, head + body)[:, :, head:]  # [rows, blocks, body]
    kept = blocks.bitwise_xor(flip).flatten(1)  # [rows, blocks * body]
    if missing := -len(kept) % PANEL_ROWS:
        kept = functional.pad(kept, (0, 0, 0, missing))
    words = (
        kept.contiguous().view(torch.int32).view(-1, PANEL_ROWS, kept.shape[1] // 4)
    )  # [panels, 16, words]
    # With the strides of its shape, also where a size is one and any stride would do.
    copied = words.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return copied.view(torch.uint8).flatten(1)


def _shape(rows: torch.Tensor, head: int, body: int, flip: int) -> torch.Tensor:
    panels, kept = -(-rows.shape[0] // PANEL_ROWS), rows.shape[1] // (head + body) * body
    return rows.new_empty((panels, kept * PANEL_ROWS))


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    forms = ((1, 1, 0, 4, 0), (16, 3, 2, 16, 0), (37, 5, 4, 16, 0), (50, 2, 2, 32, 128))
    for count, blocks, head, body, flip in (*forms, (65, 1, 0, 3584, 0), (130, 28, 0, 128, 128)):
        size = (count + 1, blocks * (head + body))
        rows = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        yield rows[1:], head, body, flip
    wide = torch.randint(0, 256, (20, 100), dtype=torch.uint8, generator=generator)
    yield wide[:, 3:83], 4, 16, 0  # rows apart, and words that begin anywhere
    yield wide.T, 0, 20, 0


panels_of_rows = Op(
    name="panels_of_rows",
    schema="(Tensor rows, int head, int body, int flip) -> Tensor",
    reference=_reference,
    shape=_shape,
    cases=_cases,
    tolerance=0.0,
)
