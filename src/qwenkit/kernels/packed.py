"""How packed matrices lie in memory: what the native products read.

Sixteen rows make a panel, in which the words of four bytes of all rows stand side by side, column
after column: `data` is uint8 [panels, 16 · bytes_per_row], scales and minimums are fp16
[panels, groups, 16]. Rows that fill up the last panel are zeros. The row form, before rows are
interleaved, is

    int4  32 columns in 16 bytes: byte i has column i low and column 16 + i high (as Q4_0 and Q4_1)
    int8  a byte per column
    bf16  two bytes per column
    fp32  four bytes per column

Whole numbers are kept with `zero_point` added, so that none is negative; a number is
(kept - zero_point) · scale + minimum. Packing is a permutation of bytes, and so invertible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from qwenkit.errors import KernelError

PANEL_ROWS = 16
KINDS = ("int4", "int8", "bf16", "fp32")  # the native kernels know them by their place here
COLUMN_MULTIPLE = {"int4": 32, "int8": 32, "bf16": 2, "fp32": 1}


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix [rows, columns] in panels. `scales` and `mins` are None where there are none."""

    kind: str
    rows: int
    columns: int
    data: torch.Tensor
    scales: torch.Tensor | None = None
    mins: torch.Tensor | None = None
    zero_point: int = 0

    @property
    def group(self) -> int:
        """Columns that share a scale; all of them where nothing is scaled."""
        return self.columns if self.scales is None else self.columns // self.scales.shape[1]


def interleave(rows: torch.Tensor) -> torch.Tensor:
    """Row form uint8 [rows, bytes_per_row], a multiple of 4 bytes, to panels [panels, bytes]."""
    width = rows.shape[1]
    if width % 4:
        raise KernelError(f"interleave: rows of {width} bytes are no whole words of four.")
    rows = functional.pad(rows, (0, 0, 0, -rows.shape[0] % PANEL_ROWS)).contiguous()
    words = rows.view(torch.int32).view(-1, PANEL_ROWS, width // 4)  # [panels, 16, words]
    return _copied(words.transpose(1, 2)).view(torch.uint8).flatten(1)  # [panels, bytes]


def deinterleave(data: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of `interleave`: uint8 [rows, bytes_per_row]."""
    words = data.view(torch.int32).view(len(data), data.shape[1] // 64, PANEL_ROWS)  # [p, w, 16]
    return _copied(words.transpose(1, 2)).view(torch.uint8).flatten(0, 1)[:rows]


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """With the strides of its shape, also where a size is one and any stride would do."""
    return tensor.clone(memory_format=torch.contiguous_format)


def interleave_groups(values: torch.Tensor) -> torch.Tensor:
    """fp16 [rows, groups] to [panels, groups, 16]."""
    padded = functional.pad(values, (0, 0, 0, -values.shape[0] % PANEL_ROWS))
    return padded.view(-1, PANEL_ROWS, values.shape[1]).transpose(1, 2).contiguous()


def deinterleave_groups(values: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of `interleave_groups`: fp16 [rows, groups]."""
    return values.transpose(1, 2).flatten(0, 1)[:rows]


def nibbles_from_numbers(numbers: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, columns] below 16 to the row form of int4, [rows, columns / 2]."""
    rows, columns = numbers.shape
    halves = numbers.reshape(rows, columns // 32, 2, 16)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def numbers_from_nibbles(nibbles: torch.Tensor) -> torch.Tensor:
    """The inverse of `nibbles_from_numbers`."""
    sixteens = nibbles.reshape(len(nibbles), nibbles.shape[1] // 16, 16)  # [rows, columns / 32, 16]
    return torch.stack((sixteens & 15, sixteens >> 4), 2).flatten(1)  # [rows, columns]


def unpack(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """All numbers as [rows, columns] in `dtype`: products of fp32, rounded once at the end."""
    row_form = deinterleave(packed.data, packed.rows)
    if packed.kind in ("bf16", "fp32"):
        return row_form.view(torch.bfloat16 if packed.kind == "bf16" else torch.float32).to(dtype)
    numbers = numbers_from_nibbles(row_form) if packed.kind == "int4" else row_form
    assert packed.scales is not None
    scales = deinterleave_groups(packed.scales, packed.rows).to(torch.float32)  # [rows, groups]
    whole = numbers.to(torch.float32) - packed.zero_point  # [rows, columns]
    by_group = whole.view(*scales.shape, packed.group)  # [rows, groups, group]
    result = by_group * scales[:, :, None]
    if packed.mins is not None:
        mins = deinterleave_groups(packed.mins, packed.rows).to(torch.float32)
        result = result + mins[:, :, None]
    return result.flatten(1).to(dtype)
