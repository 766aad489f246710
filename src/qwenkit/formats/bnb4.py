"""NF4 and FP4 (arXiv 2305.14314) in the saved layout of bitsandbytes.

A layer has `weight`, uint8 [numbers / 2, 1]: places of two numbers in a table of sixteen levels,
the first in the upper half; `weight.absmax`, fp32 [blocks]: the largest magnitude in each block of
`blocksize` numbers, which run on from row to row; `weight.quant_map`, the levels; and
`weight.quant_state.bitsandbytes__nf4`: JSON with the rest. A number is level · absmax.

Quantized twice, `weight.absmax` is uint8: places in `weight.nested_quant_map`, 256 levels, to be
multiplied by `weight.nested_absmax`, fp32, one to 256 blocks, with an offset added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Self

import torch

from qwenkit.errors import CheckpointError, NonFiniteError, UsageError
from qwenkit.formats.bnb4_quantize import (
    LEVELS,
    NESTED_SIZE,
    both_in_a_byte,
    dynamic_map,
    quantize_blocks,
    quantize_magnitudes,
)
from qwenkit.formats.bnb4_state import BLOCK_SIZES, State, misfit
from qwenkit.formats.spec import Case, Format
from qwenkit.kernels.finite import is_finite
from qwenkit.kernels.packed import (
    Packed,
    deinterleave_groups,
    interleave,
    interleave_groups,
    nibbles_from_numbers,
    numbers_of,
)
from qwenkit.layers.weight import QuantWeight, WayBack

BLOCK_SIZE = 64
_STATE = "weight.quant_state.bitsandbytes__"
_PARTS = {"weight", "weight.absmax", "weight.quant_map"}
_NESTED = {"weight.nested_absmax", "weight.nested_quant_map"}
_SLAB_NUMBERS = 1 << 22  # made at a time


class Bnb4Weight(QuantWeight):
    """A matrix as the tensors of a bitsandbytes file. Never written to.

    `origin`, int64 [rows], says which rows of the file these are, where they are not all of them in
    order: blocks may begin and end in the middle of a row.
    """

    weight: torch.Tensor
    absmax: torch.Tensor
    quant_map: torch.Tensor
    quant_state: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_quant_map: torch.Tensor | None
    origin: torch.Tensor | None

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        state: State,
        *,
        origin: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        rows, columns = state.shape
        self.shape = (rows if origin is None else len(origin), columns)
        self.state = state
        for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
            self.register_buffer(name, tensors.get(f"weight.{name}"))
        self.register_buffer("weight", tensors["weight"])
        self.register_buffer("quant_state", tensors[_STATE + state.quant_type])
        self.register_buffer("origin", origin)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], *, shape: tuple[int, int], storage: str
    ) -> Self:
        """Takes the tensors of the file under their names below the layer's path, "weight",
        "weight.absmax" …; `storage` is NF4 or FP4. Raises CheckpointError naming what does not fit.
        """
        name = _STATE + storage.lower()
        nested = _NESTED if tensors.keys() & _NESTED else set()
        expected = _PARTS | nested | {name}
        if storage.lower() not in LEVELS or tensors.keys() != expected:
            raise misfit(
                storage,
                "tensors",
                f"got {', '.join(sorted(tensors))}; expected {', '.join(sorted(expected))}.",
            )
        state = State.read(tensors[name], shape, storage)
        if (state.offset is None) == bool(nested):
            raise misfit(storage, "quant_state", "nested_offset and nested_absmax go together.")
        rows, columns = shape
        blocks = -(-rows * columns // state.blocksize)
        factors = -(-blocks // NESTED_SIZE)
        sizes: dict[str, tuple[torch.dtype, list[int]]] = {
            "weight.absmax": (torch.uint8 if nested else torch.float32, [blocks]),
            "weight.quant_map": (torch.float32, [16]),
            "weight.nested_absmax": (torch.float32, [factors]),
            "weight.nested_quant_map": (torch.float32, [256]),
        }
        for part in sorted(expected - {name, "weight"}):
            dtype, size = sizes[part]
            tensor = tensors[part]
            if tensor.dtype != dtype or list(tensor.shape) != size:
                raise misfit(
                    storage,
                    part,
                    f"got {tensor.dtype} {list(tensor.shape)}; of {rows} × {columns} numbers in "
                    f"blocks of {state.blocksize} it is {dtype} {size}.",
                )
        weight = tensors["weight"]
        if columns % 2 or weight.nbytes * 2 != rows * columns:
            raise misfit(
                storage,
                "weight",
                f"got {weight.nbytes} bytes; {rows} × {columns} numbers of four bits take "
                f"{rows * columns / 2:g}, and rows must be of whole bytes.",
            )
        return cls(tensors, state)

    @classmethod
    def quantize(
        cls, weight: torch.Tensor, kind: str, *, blocksize: int = BLOCK_SIZE, nested: bool = False
    ) -> Self:
        """Quantize float [rows, columns] to "nf4" or "fp4" as bitsandbytes does on a processor;
        `nested` quantizes the blocks' magnitudes as well.

        Raises UsageError for another kind or block size, or an odd number of columns;
        NonFiniteError when a number is NaN or infinite.
        """
        if kind not in LEVELS or blocksize not in BLOCK_SIZES or weight.shape[1] % 2:
            raise UsageError(
                f"{kind}: rows of {weight.shape[1]} numbers in blocks of {blocksize}; kinds are "
                f"nf4 and fp4, rows even, and blocks of {', '.join(map(str, BLOCK_SIZES))}."
            )
        if not is_finite(weight):
            raise NonFiniteError("the weight has NaN or infinite numbers; fetch the file again.")
        packed, absmax = quantize_blocks(weight.detach().flatten(), kind, blocksize)
        dtype = str(weight.dtype).removeprefix("torch.")
        tensors = {"weight": packed[:, None], "weight.quant_map": torch.tensor(LEVELS[kind])}
        offset = None
        if nested:
            mean = absmax.mean()
            offset = float(mean)
            places, factors = quantize_magnitudes(absmax - mean)
            tensors |= {"weight.absmax": places, "weight.nested_absmax": factors}
            tensors |= {"weight.nested_quant_map": dynamic_map()}
        else:
            tensors |= {"weight.absmax": absmax}
        state = State(kind, blocksize, dtype, tuple(weight.shape), offset)
        return cls(tensors | {_STATE + kind: state.write()}, state)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Of some rows only: quantized once, and in smaller blocks where theirs lie across rows.

        Raises UsageError where no block is so small.
        """
        if self.origin is not None:
            return _plain_tensors(
                self._places(), self._row_scales(), self.state, self.weight.dtype, self.shape
            )
        tensors = {
            "weight": self.weight,
            "weight.absmax": self.absmax,
            "weight.quant_map": self.quant_map,
            _STATE + self.state.quant_type: self.quant_state,
        }
        if self.nested_absmax is not None and self.nested_quant_map is not None:
            tensors["weight.nested_absmax"] = self.nested_absmax
            tensors["weight.nested_quant_map"] = self.nested_quant_map
        return tensors

    @property
    def storage(self) -> str:
        return self.state.quant_type.upper()

    @property
    def _width(self) -> int:
        """Columns of a row that are sure to lie in one block."""
        return math.gcd(self.shape[1], self.state.blocksize)

    def block_scales(self) -> torch.Tensor:
        """What levels are multiplied by in each block of the file, fp32 [blocks]."""
        if self.nested_absmax is None or self.nested_quant_map is None:
            return self.absmax
        factors = self.nested_absmax.repeat_interleave(NESTED_SIZE)[: len(self.absmax)]
        assert self.state.offset is not None
        return self.nested_quant_map[self.absmax.int()] * factors + self.state.offset

    def _row_scales(self) -> torch.Tensor:
        """The same by row and piece of `_width` columns, fp32 [rows, pieces]."""
        rows, columns = self.shape
        device = self.absmax.device
        origin = torch.arange(rows, device=device) if self.origin is None else self.origin
        pieces = torch.arange(0, columns, self._width, device=device)
        return self.block_scales()[(origin[:, None] * columns + pieces) // self.state.blocksize]

    @property
    def _by_row(self) -> torch.Tensor:
        """Two numbers in a byte, uint8 [rows, columns / 2]: files may hold them as any dtype."""
        return self.weight.view(torch.uint8).view(self.shape[0], self.shape[1] // 2)

    def _places(self) -> torch.Tensor:
        """The places of numbers among the levels, uint8 [rows, columns]."""
        both = self._by_row
        return torch.stack((both >> 4, both & 15), 2).flatten(1)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = self.shape
        step = max(1, _SLAB_NUMBERS // columns)
        if rows > step:
            slabs = [self.row_range(a, min(a + step, rows)) for a in range(0, rows, step)]
            return torch.cat([slab.dequantize(dtype) for slab in slabs])
        numbers = self.quant_map[self._places().int()].view(
            rows, columns // self._width, self._width
        )
        return (numbers * self._row_scales()[:, :, None]).view(rows, columns).to(dtype)

    def to_packed(self) -> Packed | None:
        rows, columns = self.shape
        levels = torch.tensor(LEVELS[self.state.quant_type], device=self.quant_map.device)
        if columns % 32 or self._width % 32 or not torch.equal(self.quant_map, levels):
            return None
        data = interleave(nibbles_from_numbers(self._places()))
        scales = interleave_groups(self._row_scales())
        return Packed(self.state.quant_type, rows, columns, data, scales)

    def way_back(self) -> WayBack:
        of_rows = WayBack(self.storage, partial(_restore_rows, self.state, self.weight.dtype))
        if self.origin is not None:
            return of_rows
        names = ("absmax", "nested_absmax", "nested_quant_map") if self._is_nested else ()
        aside = {name: getattr(self, name) for name in (*names, "quant_state")}
        restore = partial(_restore, self.state, self.weight.dtype, tuple(self.weight.shape))
        return WayBack(self.storage, restore, aside, of_rows)

    @property
    def _is_nested(self) -> bool:
        return self.nested_absmax is not None

    def select_rows(self, index: torch.Tensor) -> Self:
        origin = index if self.origin is None else self.origin[index]
        return self._of(self._by_row[index], origin)

    def row_range(self, start: int, stop: int) -> Self:
        if (start, stop) == (0, self.shape[0]):
            return self
        rows = torch.arange(start, stop, device=self.absmax.device)
        origin = rows if self.origin is None else self.origin[start:stop]
        return self._of(self._by_row[start:stop], origin)

    def _of(self, weight: torch.Tensor, origin: torch.Tensor) -> Self:
        tensors = {
            "weight": weight.reshape(-1, self.weight.itemsize).view(self.weight.dtype),
            "weight.absmax": self.absmax,
            "weight.quant_map": self.quant_map,
            _STATE + self.state.quant_type: self.quant_state,
        }
        if self._is_nested:
            tensors |= {f"weight.{n}": getattr(self, n) for n in ("nested_absmax",)}
            tensors |= {f"weight.{n}": getattr(self, n) for n in ("nested_quant_map",)}
        every = torch.arange(self.state.shape[0], device=origin.device)
        return type(self)(
            tensors, self.state, origin=None if torch.equal(origin, every) else origin
        )

    def extra_repr(self) -> str:
        twice = ", quantized twice" if self._is_nested else ""
        return f"{self.shape[0]} × {self.shape[1]}, {self.storage}, blocks of " + (
            f"{self.state.blocksize}{twice}"
        )


def _plain_tensors(
    places: torch.Tensor,
    scales: torch.Tensor,
    state: State,
    dtype: torch.dtype,
    shape: tuple[int, int],
) -> dict[str, torch.Tensor]:
    """The tensors of rows [rows, columns] with magnitudes [rows, pieces], quantized once, in blocks
    that are pieces.
    """
    width = shape[1] // scales.shape[1]
    if width not in BLOCK_SIZES:
        raise UsageError(
            f"{state.quant_type}: {shape[0]} rows of {shape[1]} numbers are no whole blocks of "
            f"{state.blocksize}, so they cannot be written by themselves."
        )
    own = State(state.quant_type, width, state.dtype, shape)
    return {
        "weight": both_in_a_byte(places)[:, None].view(dtype),
        "weight.absmax": scales.flatten(),
        "weight.quant_map": torch.tensor(LEVELS[state.quant_type], device=scales.device),
        _STATE + state.quant_type: own.write(),
    }


def _restore_rows(
    state: State, dtype: torch.dtype, packed: Packed, aside: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    assert packed.scales is not None
    scales = deinterleave_groups(packed.scales, packed.rows)
    return _plain_tensors(numbers_of(packed), scales, state, dtype, (packed.rows, packed.columns))


def _restore(
    state: State,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    packed: Packed,
    aside: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    tensors = {f"weight.{name}": t for name, t in aside.items() if name != "quant_state"}
    if "weight.absmax" not in tensors:
        assert packed.scales is not None
        flat = deinterleave_groups(packed.scales, packed.rows).flatten()  # [rows · pieces]
        count = -(-packed.rows * packed.columns // state.blocksize)
        firsts = torch.arange(count, device=flat.device) * (state.blocksize // packed.group)
        tensors["weight.absmax"] = flat[firsts]
    weight = both_in_a_byte(numbers_of(packed)).view(dtype).view(shape)
    levels = torch.tensor(LEVELS[state.quant_type], device=weight.device)
    state_name = _STATE + state.quant_type
    return tensors | {
        "weight": weight,
        "weight.quant_map": levels,
        state_name: aside["quant_state"],
    }


def _claim(storage: Mapping[str, str], quantization_config: Mapping[str, Any]) -> bool:
    stated = any(part.startswith(_STATE) for part in storage)
    return quantization_config.get("quant_method") == "bitsandbytes" and stated


def _tag(storage: Mapping[str, str], quantization_config: Mapping[str, Any]) -> str:
    found = next(part for part in storage if part.startswith(_STATE)).removeprefix(_STATE)
    stated = quantization_config.get("bnb_4bit_quant_type", "fp4")
    if stated != found:
        raise CheckpointError(
            "quantization_config", "bnb_4bit_quant_type", f"is {stated!r}; the weights are {found}."
        )
    return found.upper()


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    variants = (
        # kind, columns, block size, quantized twice, error on normally distributed numbers
        ("nf4", 192, 64, False, 0.10),
        ("nf4", 192, 64, True, 0.10),
        ("nf4", 96, 64, True, 0.10),  # blocks lie across the border of two rows
        ("fp4", 256, 128, False, 0.15),
        ("fp4", 128, 256, True, 0.16),
    )
    for kind, columns, size, nested, error in variants:
        original = torch.randn(40, columns, generator=generator) * 0.02
        weight = Bnb4Weight.quantize(original, kind, blocksize=size, nested=nested)
        yield Case(weight=weight, original=original, relative_error=error)


FORMAT = Format(
    name="bitsandbytes-4bit",
    weight=Bnb4Weight,
    claim=_claim,
    cases=_cases,
    tag=_tag,
    methods=("bitsandbytes",),
)
