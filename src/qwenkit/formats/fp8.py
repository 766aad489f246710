"""FP8 (e4m3, arXiv 2209.05433) as Qwen's own files, compressed-tensors and vLLM's tools store it.

A layer has `weight`, float8_e4m3fn [rows, columns], and scales that it is multiplied by:
`weight_scale_inv` [row blocks, column blocks], a scale for every block of, mostly, 128 × 128
numbers, as the published Qwen files have it; or `weight_scale`: one for all, [] or [1], one for
each row, [rows, 1], or by blocks as well. What belongs to activations, `input_scale`, is kept and
not used: activations are not rounded to eight bits here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch

from qwenkit.errors import CheckpointError, NonFiniteError, UsageError
from qwenkit.formats.compressed_config import schemes
from qwenkit.formats.spec import Case, Format
from qwenkit.kernels.finite import is_finite
from qwenkit.kernels.packed import (
    KINDS,
    Packed,
    deinterleave,
    deinterleave_groups,
    interleave,
    interleave_groups,
)
from qwenkit.layers.weight import QuantWeight, WayBack

LARGEST = 448.0  # of e4m3
_SCALES = ("weight_scale_inv", "weight_scale")
_UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TAG = re.compile(r"FP8(?:_(ROWS)|_(\d+)X(\d+))?")
_SLAB_NUMBERS = 1 << 22  # made at a time


@dataclass(frozen=True, slots=True)
class Grid:
    """Which numbers share a scale: blocks of `rows` × `columns`, 0 being all of them. `name` and
    `shape` are those of the scales in a file of the whole weight.
    """

    name: str
    rows: int
    columns: int
    shape: tuple[int, ...]

    @property
    def storage(self) -> str:
        """The storage tag."""
        if self.columns:
            return f"FP8_{self.rows}X{self.columns}"
        return "FP8_ROWS" if self.rows else "FP8"

    def width(self, columns: int) -> int:
        """Columns of a row that are sure to share a scale."""
        return math.gcd(columns, self.columns) or columns


class Fp8Weight(QuantWeight):
    """A matrix as the tensors of a file. Never written to.

    `scale` is [row blocks, column blocks], [rows, 1] or [1, 1]. `origin`, int64 [rows], says which
    rows of a file in blocks these are, where they are not all of them in order. `unused` are
    tensors that are only kept.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    origin: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        grid: Grid,
        *,
        unused: Mapping[str, torch.Tensor] | None = None,
        origin: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.shape = (weight.shape[0], weight.shape[1])
        self.grid, self._unused = grid, tuple(unused or ())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("origin", origin)
        for part, tensor in (unused or {}).items():
            self.register_buffer(part, tensor)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], *, shape: tuple[int, int], storage: str
    ) -> Self:
        """Takes "weight" with "weight_scale_inv" or "weight_scale" of a tag such as FP8_128X128,
        FP8_ROWS or FP8. Raises CheckpointError naming the tensor that does not fit.
        """
        tag = _TAG.fullmatch(storage)
        name = next((n for n in _SCALES if n in tensors), _SCALES[1])
        unused = {part: t for part, t in tensors.items() if part in _UNUSED}
        if tag is None or tensors.keys() - unused.keys() != {"weight", name}:
            found = ", ".join(sorted(tensors))
            raise _error(storage, "tensors", f"got {found}; expected weight and {name}.")
        weight, scale = tensors["weight"], tensors[name]
        if weight.dtype != torch.float8_e4m3fn or tuple(weight.shape) != shape:
            wanted = f"{torch.float8_e4m3fn} {list(shape)}"
            raise _error(
                storage, "weight", f"got {weight.dtype} {list(weight.shape)}, expected {wanted}."
            )
        rows, columns = shape
        block = (1, 0) if tag[1] else (int(tag[2] or 0), int(tag[3] or 0))
        down = -(-rows // block[0]) if block[0] else 1
        right = -(-columns // block[1]) if block[1] else 1
        sizes = (
            {(down, right)}
            | (set() if tag[2] else {(down,)})
            | ({()} if storage == "FP8" else set())
        )
        if tuple(scale.shape) not in sizes or scale.dtype not in _DTYPES:
            raise _error(
                storage,
                name,
                f"got {scale.dtype} {list(scale.shape)}; of {rows} × {columns} numbers it is of "
                f"floats, {' or '.join(str(list(size)) for size in sorted(sizes))}.",
            )
        grid = Grid(name, *block, tuple(scale.shape))
        return cls(weight, scale.reshape(down, right), grid, unused=unused)

    @classmethod
    def quantize(cls, weight: torch.Tensor, *, block: tuple[int, int] = (128, 128)) -> Self:
        """Round float [rows, columns] to nearest, the largest number of each block being 448.

        Raises NonFiniteError when a number is not finite.
        """
        if not is_finite(weight):
            raise NonFiniteError("the weight has NaN or infinite numbers; fetch the file again.")
        rows, columns = weight.shape
        down, right = -(-rows // block[0]), -(-columns // block[1])
        numbers = weight.detach().to(torch.float32)
        padding = (0, right * block[1] - columns, 0, down * block[0] - rows)
        blocks = torch.nn.functional.pad(numbers, padding).view(down, block[0], right, block[1])
        most = blocks.abs().amax((1, 3))  # [row blocks, column blocks]
        scale = torch.where(most > 0, most / LARGEST, 1.0)
        scaled = (blocks / scale[:, None, :, None]).clamp_(-LARGEST, LARGEST)
        kept = scaled.view(down * block[0], right * block[1])[:rows, :columns]
        grid = Grid(_SCALES[0], *block, (down, right))
        return cls(kept.contiguous().to(torch.float8_e4m3fn), scale, grid)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Raises UsageError for rows that were picked so that blocks were mixed."""
        scale = self.scale
        if self.origin is not None:
            scale = scale[_common(self.origin // self.grid.rows, self.grid.rows)]
        elif self.grid.columns or not self.grid.rows:
            scale = scale.view(self.grid.shape)
        elif len(self.grid.shape) == 1:
            scale = scale[:, 0]
        unused = {part: getattr(self, part) for part in self._unused}
        return {"weight": self.weight, self.grid.name: scale} | unused

    @property
    def storage(self) -> str:
        return self.grid.storage

    def check_finite(self) -> None:
        numbers = self.weight.view(torch.uint8)
        if not is_finite(self.scale) or bool(((numbers & 127) == 127).any()):
            raise NonFiniteError(
                f"{self.storage} weight {list(self.shape)}: one of its numbers or of its "
                f"{self.grid.name} is NaN or infinite. The file is damaged; fetch it again."
            )

    def _row_scales(self) -> torch.Tensor:
        """By row and piece of a row that shares a scale, fp32 [rows, pieces]."""
        rows, columns = self.shape
        scale = self.scale.to(torch.float32)
        if not self.grid.columns:
            return scale.expand(rows, 1)
        device = scale.device
        origin = torch.arange(rows, device=device) if self.origin is None else self.origin
        pieces = torch.arange(0, columns, self.grid.width(columns), device=device)
        return scale[(origin // self.grid.rows)[:, None], pieces // self.grid.columns]

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = self.shape
        step = max(1, _SLAB_NUMBERS // columns)
        if rows > step:
            slabs = [self.row_range(a, min(a + step, rows)) for a in range(0, rows, step)]
            return torch.cat([slab.dequantize(dtype) for slab in slabs])
        scales = self._row_scales()  # [rows, pieces]
        numbers = self.weight.to(torch.float32).view(*scales.shape, columns // scales.shape[1])
        return (numbers * scales[:, :, None]).view(rows, columns).to(dtype)

    def to_packed(self) -> Packed | None:
        rows, columns = self.shape
        if columns % 4 or self.grid.width(columns) % KINDS["fp8"].multiple:
            return None
        data = interleave(self.weight.view(torch.uint8))
        return Packed("fp8", rows, columns, data, interleave_groups(self._row_scales()))

    def way_back(self) -> WayBack:
        unused = {part: getattr(self, part) for part in self._unused}
        return WayBack(self.storage, partial(_restore, self.grid, self.scale.dtype), unused)

    def select_rows(self, index: torch.Tensor) -> Self:
        if self.grid.columns:
            origin = index if self.origin is None else self.origin[index]
            return self._of(self.weight.view(torch.uint8)[index], self.scale, origin)
        scale = self.scale[index] if self.grid.rows else self.scale
        return self._of(self.weight.view(torch.uint8)[index], scale, None)

    def row_range(self, start: int, stop: int) -> Self:
        if (start, stop) == (0, self.shape[0]):
            return self
        weight = self.weight.view(torch.uint8)[start:stop]
        if self.grid.columns:
            rows = torch.arange(start, stop, device=weight.device)
            origin = rows if self.origin is None else self.origin[start:stop]
            return self._of(weight, self.scale, origin)
        return self._of(weight, self.scale[start:stop] if self.grid.rows else self.scale, None)

    def _of(self, weight: torch.Tensor, scale: torch.Tensor, origin: torch.Tensor | None) -> Self:
        if origin is not None:
            count = len(origin)
            blocks = -(-count // self.grid.rows)
            every = torch.arange(count, device=origin.device)
            if blocks == len(scale) and torch.equal(origin, every):
                origin = None
        unused = {part: getattr(self, part) for part in self._unused}
        return type(self)(
            weight.view(torch.float8_e4m3fn), scale, self.grid, unused=unused, origin=origin
        )

    def extra_repr(self) -> str:
        return f"{self.shape[0]} × {self.shape[1]}, {self.storage}"


def _error(storage: str, field: str, message: str) -> CheckpointError:
    return CheckpointError(f"{storage} weight", field, message)


def _common(blocks: torch.Tensor, rows: int) -> torch.Tensor:
    """Of each run of `rows` of [n] the number that all of it has. Raises UsageError if not."""
    firsts = blocks[::rows]
    if not torch.equal(firsts.repeat_interleave(rows)[: len(blocks)], blocks):
        raise UsageError(f"rows of several blocks of {rows} rows cannot be written as one block.")
    return firsts


def _restore(
    grid: Grid, dtype: torch.dtype, packed: Packed, aside: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Raises UsageError where rows of one block have different scales."""
    assert packed.scales is not None
    weight = deinterleave(packed.data, packed.rows).view(torch.float8_e4m3fn)
    scale = deinterleave_groups(packed.scales, packed.rows)  # [rows, pieces]
    if grid.columns:
        scale = scale[:, :: grid.columns // packed.group]  # [rows, column blocks]
        firsts = scale[:: grid.rows]
        if not torch.equal(firsts.repeat_interleave(grid.rows, 0)[: len(scale)], scale):
            raise UsageError(
                f"{grid.storage}: rows of several blocks cannot be written as one block."
            )
        scale = firsts
    elif not grid.rows:
        scale = scale[:1].view(grid.shape)
    elif len(grid.shape) == 1:
        scale = scale[:, 0]
    return {
        "weight": weight,
        grid.name: scale.to(dtype).clone(memory_format=torch.contiguous_format),
        **aside,
    }


def _claim(storage: Mapping[str, str], quantization_config: Mapping[str, Any]) -> bool:
    method = quantization_config.get("quant_method")
    return method in ("fp8", "compressed-tensors") and storage.get("weight") == "F8_E4M3"


def _tag(storage: Mapping[str, str], quantization_config: Mapping[str, Any]) -> str:
    if quantization_config.get("quant_method") == "compressed-tensors":
        kinds = {scheme.fp8_tag for scheme in schemes(quantization_config) if scheme.fp8_tag}
        if len(kinds) != 1:
            stated = ", ".join(sorted(kinds)) or "none"
            raise CheckpointError(
                "quantization_config",
                "config_groups",
                f"weights are FP8, of which there are {stated} in it; exactly one is read.",
            )
        return kinds.pop()
    if quantization_config.get("fmt", "e4m3") != "e4m3":
        given = quantization_config["fmt"]
        raise CheckpointError("quantization_config", "fmt", f"got {given!r}; only e4m3 is read.")
    block = quantization_config.get("weight_block_size")
    if block is None:
        return "FP8"
    if not isinstance(block, list) or [type(n) for n in block] != [int, int] or min(block) < 1:
        raise CheckpointError(
            "quantization_config", "weight_block_size", f"got {block!r}; expected two numbers."
        )
    return f"FP8_{block[0]}X{block[1]}"


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for block, name in (((16, 32), "FP8_16X32"), ((1, 96), "FP8_ROWS"), ((40, 96), "FP8")):
        original = torch.randn(40, 96, generator=generator) * 0.02
        made = Fp8Weight.quantize(original, block=block)
        tensors = {"weight": made.weight, "weight_scale": made.scale}
        if name == "FP8_16X32":
            tensors = made.to_tensors()
        weight = Fp8Weight.from_tensors(tensors, shape=(40, 96), storage=name)
        yield Case(weight=weight, original=original, relative_error=0.03)


FORMAT = Format(
    name="fp8",
    weight=Fp8Weight,
    claim=_claim,
    cases=_cases,
    tag=_tag,
    methods=("fp8", "compressed-tensors"),
)
