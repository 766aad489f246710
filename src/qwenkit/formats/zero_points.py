"""Numbers with a scale and a zero point for each group as panels: what GPTQ, AWQ and others store.

Two and three bits are kept as four. Where one zero point is that of every group, as in symmetric
files, it is that of the matrix. Groups of other sizes than the native kernels know are cut into the
largest of 128, 64 and 32 columns that divides them.
"""

from __future__ import annotations

import torch

from qwenkit.kernels.packed import (
    Packed,
    deinterleave_groups,
    interleave,
    interleave_groups,
    nibbles_from_numbers,
    numbers_of,
)

_PIECES = (128, 64, 32)  # columns by which tokens are rounded


def pack_groups(
    numbers: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | int,
    *,
    bits: int,
    order: torch.Tensor | None = None,
) -> Packed | None:
    """Numbers uint8 [rows, columns], each below 2^bits, with `scales` [rows, groups] of any float
    dtype and zero points uint8 [rows, groups], or one for all, in panels; None where groups are no
    multiple of 32 columns.

    With an `order`, int32 [columns], the columns are those of a matrix in that order.
    """
    rows, columns = numbers.shape
    times = repeats(columns, scales.shape[1])
    if times == 0:
        return None
    scales = scales if scales.dtype is torch.float16 else scales.to(torch.float32)
    mins, middle = None, 0
    if isinstance(zero_points, int):
        middle = zero_points
    elif bool((zero_points == zero_points[0, 0]).all()):
        middle = int(zero_points[0, 0])
    else:
        mins = interleave_groups(zero_points.repeat_interleave(times, 1))
    kind, kept = ("int8", numbers) if bits == 8 else ("int4", nibbles_from_numbers(numbers))
    scales = interleave_groups(scales.repeat_interleave(times, 1))
    return Packed(kind, rows, columns, interleave(kept), scales, mins, middle, order)


def repeats(columns: int, groups: int) -> int:
    """How often each scale is repeated so that native products know the groups: 1 where they do as
    they are, 0 where there is no way.
    """
    if not groups or columns % groups or (columns // groups) % 32:
        return 0
    size = columns // groups
    piece = next(p for p in _PIECES if size % p == 0)
    whole = size == columns or (size // piece).bit_count() == 1
    return 1 if whole else size // piece


def unpack_scales(packed: Packed, groups: int) -> torch.Tensor:
    """The scales again, [rows, groups]."""
    assert packed.scales is not None
    return _unrepeated(deinterleave_groups(packed.scales, packed.rows), groups)


def unpack_zero_points(packed: Packed, groups: int) -> torch.Tensor:
    """The zero points again, uint8 [rows, groups]."""
    if packed.mins is None:
        middle = torch.tensor(packed.zero_point, dtype=torch.uint8, device=packed.data.device)
        return middle.expand(packed.rows, groups)
    return _unrepeated(deinterleave_groups(packed.mins, packed.rows), groups)


def _unrepeated(values: torch.Tensor, groups: int) -> torch.Tensor:
    return values[:, :: values.shape[1] // groups]


def sorted_columns(g_idx: torch.Tensor, groups: int) -> torch.Tensor | None:
    """The columns group by group, int64, in their order within each; None where groups are of
    different sizes. `g_idx` [columns] is the group of each.
    """
    sizes = g_idx.long().bincount(minlength=groups)
    return None if bool((sizes != sizes[0]).any()) else g_idx.argsort(stable=True)


def is_in_order(order: torch.Tensor) -> bool:
    """Whether it leaves every column where it is."""
    return torch.equal(order, torch.arange(len(order), device=order.device))


def in_file_order(packed: Packed, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept numbers, uint8 [rows, columns], in the order of the file, and each column's group,
    int64 [columns].
    """
    numbers = numbers_of(packed)
    g_idx = torch.arange(packed.columns, device=numbers.device) // (packed.columns // groups)
    if packed.order is None:
        return numbers, g_idx
    order = packed.order.long()
    return (
        torch.empty_like(numbers).index_copy_(1, order, numbers),
        torch.empty_like(g_idx).index_copy_(0, order, g_idx),
    )
