"""How packed matrices lie in memory: what the native products read.

Sixteen rows make a panel, in which the words of four bytes of all rows stand side by side, column
after column: `data` is uint8 [panels, 16 · bytes_per_row], scales and minimums are
[panels, groups, 16]. Rows that fill up the last panel are zeros. The row form, before rows are
interleaved, is

    four bits   32 columns in 16 bytes: byte i has column i low and column 16 + i high (as Q4_0)
    eight bits  a byte per column
    bf16        two bytes per column
    fp32        four bytes per column

What the kept numbers mean is said by the kind. Whole numbers are kept with `zero_point` added, so
that none is negative; a number is (kept - zero_point) · scale + minimum. Of kinds with levels the
kept numbers are places in a table. Packing is a permutation of bytes, and so invertible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch.nn import functional

from qwenkit.errors import KernelError
from qwenkit.kernels.blocks import IQ4_NL_LEVELS
from qwenkit.kernels.ops.panels_of_rows import PANEL_ROWS as PANEL_ROWS
from qwenkit.kernels.ops.panels_of_rows import panels_of_rows

# The levels of NF4 are quantiles of the normal distribution, those of FP4 what a sign, two bits of
# exponent and one of mantissa say; both scaled to reach 1 (arXiv 2305.14314; bitsandbytes).
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_SIZES = (
    *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
    *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
)
FP4_LEVELS = (*_FP4_SIZES, *(-size for size in _FP4_SIZES))


@dataclass(frozen=True, slots=True)
class Kind:
    """What kept numbers are: `form` is int4, int8, bf16, fp32 or fp8 (e4m3), `bits` those of each,
    `multiple` what the columns of a row must be a multiple of.

    With `levels`, sixteen of them, a kept number is the place of one. Native products have it as
    the nearest of whole numbers times `unit`; without levels a number is `unit` times larger than
    its kept number and scale say.
    """

    form: str
    bits: int
    multiple: int
    levels: tuple[float, ...] | None = None
    unit: float = 1.0

    @property
    def steps(self) -> tuple[int, ...] | None:
        """The levels as whole numbers of units, from -127 to 127."""
        return None if self.levels is None else tuple(round(v / self.unit) for v in self.levels)


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "int4": Kind("int4", 4, 32),
        "int8": Kind("int8", 8, 32),
        "bf16": Kind("bf16", 16, 2),
        "fp32": Kind("fp32", 32, 1),
        "fp8": Kind("fp8", 8, 4),
        # Units that leave whole numbers nearest to the levels: off by 0.0017 of the largest on
        # average, where rounding to a level is off by 0.03.
        "nf4": Kind("int4", 4, 32, NF4_LEVELS, 1 / 112.03),
        "fp4": Kind("int4", 4, 32, FP4_LEVELS, 1 / 120),
        "iq4_nl": Kind("int4", 4, 32, tuple(map(float, IQ4_NL_LEVELS))),
        "llm_int8": Kind("int8", 8, 32, unit=7.874015718698502e-3),  # 1 / 127
    }
)
FORMS = ("int4", "int8", "bf16", "fp32", "fp8")  # the native kernels know them by their place here


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix [rows, columns] in panels. `scales` and `mins` are None where there are none.

    Scales are fp16 or fp32. Minimums are of the scales' dtype, or uint8: then they are zero points
    of each group, and a number is (kept - zero point) · scale. With an `order`, int32 [columns],
    column i of the panels is column order[i] of the matrix, and so of what it is multiplied with.
    """

    kind: str
    rows: int
    columns: int
    data: torch.Tensor
    scales: torch.Tensor | None = None
    mins: torch.Tensor | None = None
    zero_point: int = 0
    order: torch.Tensor | None = None

    @property
    def group(self) -> int:
        """Columns that share a scale; all of them where nothing is scaled."""
        return self.columns if self.scales is None else self.columns // self.scales.shape[1]


def interleave(rows: torch.Tensor) -> torch.Tensor:
    """Row form uint8 [rows, bytes_per_row], a multiple of 4 bytes, to panels [panels, bytes]."""
    width = rows.shape[1]
    if width % 4:
        raise KernelError(f"interleave: rows of {width} bytes are no whole words of four.")
    panels: torch.Tensor = panels_of_rows(rows, 0, width, 0)
    return panels


def deinterleave(data: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of `interleave`: uint8 [rows, bytes_per_row]."""
    words = data.view(torch.int32).view(len(data), data.shape[1] // 64, PANEL_ROWS)  # [p, w, 16]
    return _copied(words.transpose(1, 2)).view(torch.uint8).flatten(0, 1)[:rows]


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """With the strides of its shape, also where a size is one and any stride would do."""
    return tensor.clone(memory_format=torch.contiguous_format)


def interleave_groups(values: torch.Tensor) -> torch.Tensor:
    """[rows, groups] to [panels, groups, 16]."""
    missing = -values.shape[0] % PANEL_ROWS
    padded = functional.pad(values, (0, 0, 0, missing)) if missing else values
    return padded.view(-1, PANEL_ROWS, values.shape[1]).transpose(1, 2).contiguous()


def deinterleave_groups(values: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of `interleave_groups`: [rows, groups]."""
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


def numbers_of(packed: Packed) -> torch.Tensor:
    """The kept numbers of a whole kind, uint8 [rows, columns]."""
    row_form = deinterleave(packed.data, packed.rows)
    return numbers_from_nibbles(row_form) if KINDS[packed.kind].bits == 4 else row_form


def select_rows(packed: Packed, index: torch.Tensor) -> Packed:
    """The given rows [n] int64, in panels of their own."""

    def groups(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        return interleave_groups(deinterleave_groups(values, packed.rows)[index])

    data = interleave(deinterleave(packed.data, packed.rows)[index])
    scales, mins = groups(packed.scales), groups(packed.mins)
    size = len(index), packed.columns
    return Packed(packed.kind, *size, data, scales, mins, packed.zero_point, packed.order)


def unpack(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """All numbers as [rows, columns] in `dtype`: products of fp32, rounded once at the end."""
    if packed.order is not None:
        result = torch.empty((packed.rows, packed.columns), dtype=dtype, device=packed.data.device)
        result[:, packed.order.long()] = unpack(replace(packed, order=None), dtype)
        return result
    kind = KINDS[packed.kind]
    if kind.form in ("bf16", "fp32"):
        row_form = deinterleave(packed.data, packed.rows)
        return row_form.view(torch.bfloat16 if kind.form == "bf16" else torch.float32).to(dtype)
    assert packed.scales is not None
    scales = deinterleave_groups(packed.scales, packed.rows).to(torch.float32)[:, :, None]
    kept = numbers_of(packed)
    if kind.form == "fp8":
        numbers = kept.view(torch.float8_e4m3fn).to(torch.float32)
    elif kind.levels is not None:
        numbers = torch.tensor(kind.levels, device=kept.device)[kept.int()]
    else:
        numbers = kept.to(torch.float32) - packed.zero_point
    by_group = numbers.view(packed.rows, scales.shape[1], packed.group)  # [rows, groups, group]
    mins = None
    if packed.mins is not None:
        mins = deinterleave_groups(packed.mins, packed.rows).to(torch.float32)[:, :, None]
        if packed.mins.dtype is torch.uint8:
            by_group, mins = by_group - mins, None
    result = by_group * scales
    if kind.levels is None and kind.unit != 1:
        result = result * kind.unit
    if mins is not None:
        result = result + mins
    return result.flatten(1).to(dtype)
