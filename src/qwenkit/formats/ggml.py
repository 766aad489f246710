"""GGML's block types as a weight: the bytes of a GGUF file, used as they lie there.

The blocks of a matrix stay one uint8 tensor, usually a view of the memory-mapped file; numbers are
made a few rows at a time when they are needed. Layouts: `qwenkit.kernels.blocks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch

from qwenkit.errors import CheckpointError, NonFiniteError
from qwenkit.formats.ggml_panels import PACKED_BLOCKS
from qwenkit.formats.ggml_quantize import quantize_blocks
from qwenkit.formats.spec import Case, Format
from qwenkit.kernels.blocks import BLOCK_LAYOUTS, block_layout, first_nonfinite_block
from qwenkit.kernels.finite import is_finite
from qwenkit.kernels.ops.block_dequantize import block_dequantize
from qwenkit.kernels.ops.block_matmul import block_matmul
from qwenkit.kernels.ops.grouped_matmul import segments
from qwenkit.kernels.packed import Packed
from qwenkit.layers.weight import QuantWeight, WayBack

# Root-mean-square error of each type on normally distributed numbers, relative to theirs.
_NORMAL_ERROR: Mapping[str, float] = {
    "Q4_0": 0.090,
    "Q4_1": 0.082,
    "Q5_0": 0.045,
    "Q5_1": 0.040,
    "Q8_0": 0.006,
    "IQ4_NL": 0.080,
    "IQ4_XS": 0.081,
    "Q2_K": 0.300,
    "Q3_K": 0.155,
    "Q4_K": 0.077,
    "Q5_K": 0.039,
    "Q6_K": 0.019,
}


class GgmlWeight(QuantWeight):
    """A matrix as uint8 `blocks` [rows, bytes_per_row] of one block type. Never written to."""

    blocks: torch.Tensor

    def __init__(self, blocks: torch.Tensor, block_type: str) -> None:
        """Raises KernelError for an unknown type or rows that are not whole blocks."""
        super().__init__()
        self.register_buffer("blocks", blocks)
        self.block_type = block_type
        self.shape = (blocks.shape[0], block_layout(block_type).columns(blocks.shape[1]))

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], *, shape: tuple[int, int], storage: str
    ) -> Self:
        """Takes {"weight": uint8 [rows, bytes_per_row]} without copying it. Raises CheckpointError
        when these are not the blocks of a matrix of this shape, KernelError for an unknown type.
        """
        layout = block_layout(storage)
        blocks = tensors["weight"]
        rows, columns = shape
        if columns < 1 or columns % layout.block_columns:
            raise CheckpointError(
                f"{storage} tensor",
                "weight",
                f"the shape {shape} was declared, but rows are whole blocks of "
                f"{layout.block_columns} numbers. The file is not what it says.",
            )
        expected = (rows, layout.bytes_per_row(columns))
        if blocks.dtype != torch.uint8 or tuple(blocks.shape) != expected:
            raise CheckpointError(
                f"{storage} tensor",
                "weight",
                f"got {blocks.dtype} {list(blocks.shape)}; a matrix of {rows} × {columns} takes "
                f"{torch.uint8} {list(expected)}. The file is cut short or not what it says.",
            )
        return cls(blocks, storage)

    @classmethod
    def quantize(cls, weight: torch.Tensor, storage: str) -> Self:
        """Quantize float [rows, columns]. Raises as `quantize_blocks` does."""
        return cls(quantize_blocks(weight, storage), storage)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.blocks}

    @property
    def storage(self) -> str:
        return self.block_type

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        numbers: torch.Tensor = block_dequantize(self.blocks, self.block_type, dtype)
        return numbers  # [rows, columns]

    def to_packed(self) -> Packed | None:
        known = PACKED_BLOCKS.get(self.block_type)
        return None if known is None else known.pack(self.blocks, self.shape)

    def way_back(self) -> WayBack:
        block = PACKED_BLOCKS[self.block_type]
        return WayBack(self.block_type, lambda packed, _: {"weight": block.unpack(packed)})

    def select_rows(self, index: torch.Tensor) -> Self:
        return type(self)(self.blocks.index_select(0, index), self.block_type)

    def row_range(self, start: int, stop: int) -> Self:
        return type(self)(self.blocks[start:stop], self.block_type)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        taken = self.blocks.index_select(0, ids)  # [tokens, bytes_per_row]
        numbers: torch.Tensor = block_dequantize(taken, self.block_type, dtype)
        return numbers  # [tokens, columns]

    def matmul(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return super().matmul(x, bias, residual)
        y: torch.Tensor = block_matmul(x.reshape(-1, self.shape[1]), self.blocks, self.block_type)
        y = y.view(*x.shape[:-1], self.shape[0])
        y = y if bias is None else y + bias
        return y if residual is None else residual + y

    def grouped_matmul(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return super().grouped_matmul(x, ends)
        out_rows = self.shape[0] // ends.numel()
        y = x.new_empty((x.shape[0], out_rows))
        for group, a, b in segments(ends):
            blocks = self.blocks[group * out_rows : (group + 1) * out_rows]
            y[a:b] = block_matmul(x[a:b], blocks, self.block_type)
        return y  # [rows, out_rows]

    def check_finite(self) -> None:
        """Raises NonFiniteError naming the first row and columns whose scale is NaN or infinite.

        Reads the scales only: with finite scales every number is finite.
        """
        if self._factors_are_finite():
            return
        found = first_nonfinite_block(self.blocks, self.block_type)
        assert found is not None
        width = BLOCK_LAYOUTS[self.block_type].block_columns
        row, block = found
        raise NonFiniteError(
            f"{self.block_type} weight {list(self.shape)}: the scale of row {row}, columns "
            f"{block * width} to {(block + 1) * width - 1} is NaN or infinite. "
            "The file is damaged; fetch it again."
        )

    def _factors_are_finite(self) -> bool:
        layout = BLOCK_LAYOUTS[self.block_type]
        halves = self.blocks.view(torch.float16).view(len(self.blocks), -1, layout.block_bytes // 2)
        return all(is_finite(halves[:, :, offset // 2]) for offset in layout.half_offsets)

    def extra_repr(self) -> str:
        return f"{self.shape[0]} × {self.shape[1]}, {self.block_type}"


def _claim(storage: Mapping[str, str], quantization_config: Mapping[str, Any]) -> bool:
    return storage.get("weight") in BLOCK_LAYOUTS


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, layout in BLOCK_LAYOUTS.items():
        numbers = torch.randn(37, 3 * layout.block_columns, generator=generator) * 0.02
        yield Case(
            weight=GgmlWeight.quantize(numbers, name),
            original=numbers,
            relative_error=_NORMAL_ERROR[name],
        )


FORMAT = Format(name="ggml", weight=GgmlWeight, claim=_claim, cases=_cases)
