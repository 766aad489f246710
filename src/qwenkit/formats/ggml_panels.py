"""GGML's types of one scale per 32 columns as panels: their bytes are moved, none is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from qwenkit.kernels.ops.panels_of_rows import panels_of_rows
from qwenkit.kernels.packed import (
    KINDS,
    Packed,
    deinterleave,
    deinterleave_groups,
    interleave_groups,
)

_WIDTH = 32


@dataclass(frozen=True, slots=True)
class PackedBlock:
    """A block type: `head` bytes of scale and perhaps minimum, then the numbers of a kind."""

    kind: str
    head: int
    zero_point: int

    @property
    def body(self) -> int:
        """Bytes of a block's numbers."""
        return _WIDTH * KINDS[self.kind].bits // 8

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many columns."""
        return columns // _WIDTH * (self.head + self.body)

    def pack(self, blocks: torch.Tensor, shape: tuple[int, int]) -> Packed:
        """Blocks uint8 [rows, row_bytes] in panels."""
        rows, columns = shape
        by_block = blocks.view(rows, columns // _WIDTH, self.head + self.body)
        halves = [
            interleave_groups(by_block[:, :, i : i + 2].contiguous().view(torch.float16)[:, :, 0])
            for i in range(0, self.head, 2)
        ]
        mins = halves[1] if len(halves) > 1 else None
        flip = 128 if self.kind == "int8" else 0  # from two's complement to 128 added
        data: torch.Tensor = panels_of_rows(blocks, self.head, self.body, flip)
        return Packed(self.kind, rows, columns, data, halves[0], mins, self.zero_point)

    def unpack(self, packed: Packed) -> torch.Tensor:
        """The inverse of `pack`."""
        assert packed.scales is not None
        heads = [packed.scales] if packed.mins is None else [packed.scales, packed.mins]
        halves = [deinterleave_groups(h, packed.rows).contiguous() for h in heads]
        parts = [h.view(torch.uint8).view(*h.shape, 2) for h in halves]
        kept = deinterleave(packed.data, packed.rows).view(*halves[0].shape, self.body)
        if self.kind == "int8":
            kept = kept ^ 128
        return torch.cat((*parts, kept), 2).flatten(1)


PACKED_BLOCKS: Mapping[str, PackedBlock] = MappingProxyType(
    {
        "Q4_0": PackedBlock("int4", 2, 8),
        "Q4_1": PackedBlock("int4", 4, 0),
        "Q8_0": PackedBlock("int8", 2, 128),
        "IQ4_NL": PackedBlock("iq4_nl", 2, 0),
    }
)
