"""How GGML's block types lie in bytes, and how bytes become numbers again.

A row of a matrix is cut into blocks of 32 or 256 numbers; a block is a few half-precision factors
and small integer codes. Every type here is one formula, `number = scale · code - minimum`, with a
scale and perhaps a minimum for each group of 16 or 32 numbers of the block. Layouts follow the GGUF
specification (ggml's docs/gguf.md and ggml-common.h). All of it is little-endian, as are files.

Knows bytes only: no files, no layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch

from qwenkit.errors import KernelError, suggest

CHUNK_NUMBERS = 1 << 18  # numbers worked on at once: one MiB as fp32, which stays in cache

# IQ4_NL's sixteen levels, denser around zero as weights are.
IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class Parts:
    """Unpacked blocks: `codes` 8-bit integers [blocks, groups, width]; `scale` and `minimum` fp32,
    broadcastable to it.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None = None

    def numbers(self) -> torch.Tensor:
        """fp32 [blocks, groups, width]; product and difference are rounded one after the other."""
        numbers = self.codes.to(torch.float32).mul_(self.scale)
        return numbers if self.minimum is None else numbers.sub_(self.minimum)


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """One block type. `half_offsets` are the byte offsets of the block's half-precision factors;
    `unpack` takes uint8 [blocks, block_bytes].
    """

    name: str
    block_columns: int
    block_bytes: int
    half_offsets: tuple[int, ...]
    unpack: Callable[[torch.Tensor], Parts]

    def columns(self, bytes_per_row: int) -> int:
        """Numbers in a row of so many bytes. Raises KernelError unless blocks fill it exactly."""
        if bytes_per_row < 1 or bytes_per_row % self.block_bytes:
            raise KernelError(
                f"{self.name}: a row of {bytes_per_row} bytes was given; it must be one or more "
                f"whole blocks of {self.block_bytes} bytes."
            )
        return bytes_per_row // self.block_bytes * self.block_columns

    def bytes_per_row(self, columns: int) -> int:
        """Bytes of a row of so many numbers. Raises KernelError unless it is whole blocks."""
        if columns < 1 or columns % self.block_columns:
            raise KernelError(
                f"{self.name}: a row of {columns} numbers was given; it must be one or more whole "
                f"blocks of {self.block_columns}. Choose a type with smaller blocks."
            )
        return columns // self.block_columns * self.block_bytes


def block_layout(block_type: str) -> BlockLayout:
    """The layout of a block type by its GGML name. Raises KernelError for an unknown name."""
    layout = BLOCK_LAYOUTS.get(block_type)
    if layout is None:
        raise KernelError(
            f"unknown block type {block_type!r}. {suggest(block_type, BLOCK_LAYOUTS)}"
        )
    return layout


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Cut `rows` rows into slices of about CHUNK_NUMBERS numbers, at least one row each."""
    step = max(1, CHUNK_NUMBERS // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def unpack_rows(blocks: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """Rows of blocks, uint8 [rows, bytes_per_row], as fp32 [rows, columns], all at once."""
    columns = layout.columns(blocks.shape[-1])
    parts = layout.unpack(blocks.reshape(-1, layout.block_bytes))
    return parts.numbers().view(blocks.shape[0], columns)


def first_nonfinite_block(blocks: torch.Tensor, block_type: str) -> tuple[int, int] | None:
    """(row, block in the row) of the first block of [rows, bytes_per_row] with a factor that is NaN
    or infinite; None when all are finite, and then so is every number.
    """
    layout = block_layout(block_type)
    columns = layout.columns(blocks.shape[-1])
    for rows in row_chunks(blocks.shape[0], columns):
        by_block = blocks[rows].reshape(rows.stop - rows.start, -1, layout.block_bytes)
        # A half is NaN or infinite when its five exponent bits are all set: its high byte tells.
        high_bytes = torch.stack([by_block[..., o + 1] for o in layout.half_offsets], -1)
        bad = ((high_bytes & 0x7C) == 0x7C).any(-1)  # [rows, blocks]
        if bad.any():
            row, block = bad.nonzero()[0].tolist()
            return rows.start + row, block
    return None


def example_blocks(
    block_type: str, shape: tuple[int, int], *, scale: float, generator: torch.Generator
) -> torch.Tensor:
    """Random valid blocks for tests, uint8 [rows, bytes_per_row] of a [rows, columns] matrix: every
    bit pattern may occur, but the half-precision factors are normal with deviation `scale`.
    """
    layout = block_layout(block_type)
    rows, columns = shape
    count = rows * layout.bytes_per_row(columns) // layout.block_bytes
    blocks = torch.randint(256, (count, layout.block_bytes), dtype=torch.uint8, generator=generator)
    for offset in layout.half_offsets:
        halves = (torch.randn(count, 1, generator=generator) * scale).clamp(-65504.0, 65504.0)
        blocks[:, offset : offset + 2] = halves.to(torch.float16).view(torch.uint8)
    return blocks.view(rows, -1)


def _half(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The half-precision number at a byte offset of each block, as fp32 [blocks, 1, 1]."""
    # The copy makes it aligned: a view of two bytes in the middle of a block may not be.
    pair = blocks[:, offset : offset + 2].clone(memory_format=torch.contiguous_format)
    return pair.view(torch.float16).to(torch.float32).unsqueeze(-1)


def _fields(packed: torch.Tensor, bits: int, *, sections: int) -> torch.Tensor:
    """Split bytes into fields of `bits` bits: in each of the equal sections that [blocks, bytes]
    falls into, first the lowest bits of all its bytes, then the next; uint8 [blocks, numbers].
    """
    whole = packed.reshape(packed.shape[0], sections, -1).contiguous()
    mask = (1 << bits) - 1  # shifts by a plain number are twice as fast as by a broadcast tensor
    return torch.stack([(whole >> low) & mask for low in range(0, 8, bits)], 2).flatten(1)


def _signed(codes: torch.Tensor, zero: int) -> torch.Tensor:
    return (codes - zero).view(torch.int8)  # wraps around below zero, which int8 reads rightly


def _unpack_q8_0(blocks: torch.Tensor) -> Parts:
    return Parts(blocks[:, None, 2:].view(torch.int8), _half(blocks, 0))


def _unpack_32(blocks: torch.Tensor, *, has_minimum: bool, has_fifth_bit: bool) -> Parts:
    """Q4_0, Q4_1, Q5_0 and Q5_1: scale, minimum, 4 bytes of fifth bits, 16 bytes of nibbles."""
    codes = _fields(blocks[:, -16:], 4, sections=1)  # [blocks, 32]
    if has_fifth_bit:
        codes |= _fields(blocks[:, -20:-16], 1, sections=4) << 4
    codes = codes.unsqueeze(1)  # [blocks, 1, 32]
    if has_minimum:
        return Parts(codes, _half(blocks, 0), -_half(blocks, 2))  # stored with the opposite sign
    return Parts(_signed(codes, 16 if has_fifth_bit else 8), _half(blocks, 0))


def _unpack_iq4_nl(blocks: torch.Tensor) -> Parts:
    levels = torch.tensor(IQ4_NL_LEVELS, dtype=torch.int8, device=blocks.device)
    codes = _fields(blocks[:, 2:], 4, sections=1)  # [blocks, 32]
    return Parts(levels[codes.int()].unsqueeze(1), _half(blocks, 0))


def _unpack_iq4_xs(blocks: torch.Tensor) -> Parts:
    """A factor, 2 bytes of upper and 4 of lower parts of eight 6-bit scales, 128 of codes."""
    levels = torch.tensor(IQ4_NL_LEVELS, dtype=torch.int8, device=blocks.device)
    codes = _fields(blocks[:, 8:], 4, sections=8)  # [blocks, 256]
    low = _fields(blocks[:, 4:8], 4, sections=4)  # [blocks, 8]
    high = _fields(blocks[:, 2:4], 2, sections=2)  # [blocks, 8]
    scales = _signed(low | (high << 4), 32).unsqueeze(-1)
    return Parts(levels[codes.int()].view(-1, 8, 32), _half(blocks, 0) * scales.float())


def _unpack_q2_k(blocks: torch.Tensor) -> Parts:
    """16 bytes of 4-bit scales and minimums, 64 of 2-bit codes, two factors."""
    codes = _fields(blocks[:, 16:80], 2, sections=2).view(-1, 16, 16)
    scales = blocks[:, :16, None]  # [blocks, 16, 1]
    return Parts(
        codes,
        _half(blocks, 80) * (scales & 0xF).float(),
        _half(blocks, 82) * (scales >> 4).float(),
    )


def _unpack_q3_k(blocks: torch.Tensor) -> Parts:
    """32 bytes of third bits, 64 of low 2-bit codes, 12 of 6-bit scales, one factor."""
    codes = _fields(blocks[:, 32:96], 2, sections=2)  # [blocks, 256]
    codes |= _fields(blocks[:, :32], 1, sections=1) << 2
    low = _fields(blocks[:, 96:104], 4, sections=1)  # [blocks, 16]
    high = _fields(blocks[:, 104:108], 2, sections=1)  # [blocks, 16]
    scales = _signed(low | (high << 4), 32).unsqueeze(-1)
    return Parts(_signed(codes, 4).view(-1, 16, 16), _half(blocks, 108) * scales.float())


def _unpack_q4_k(blocks: torch.Tensor) -> Parts:
    """Two factors, 12 bytes of 6-bit scales and minimums, 128 of 4-bit codes."""
    codes = _fields(blocks[:, 16:], 4, sections=4)  # [blocks, 256]
    return _with_six_bit_scales(blocks, codes.view(-1, 8, 32))


def _unpack_q5_k(blocks: torch.Tensor) -> Parts:
    """As Q4_K, with 32 bytes of fifth bits before the 4-bit codes."""
    codes = _fields(blocks[:, 48:], 4, sections=4)  # [blocks, 256]
    codes |= _fields(blocks[:, 16:48], 1, sections=1) << 4
    return _with_six_bit_scales(blocks, codes.view(-1, 8, 32))


def _with_six_bit_scales(blocks: torch.Tensor, codes: torch.Tensor) -> Parts:
    """Bytes 4 to 15 hold eight scales and eight minimums of 6 bits: four whole scales, four whole
    minimums, then the low nibbles of the others, whose upper bits top the first eight bytes.
    """
    first, second, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 0x3F, (low & 0xF) | ((first >> 2) & 0x30)], 1).unsqueeze(-1)
    minimums = torch.cat([second & 0x3F, (low >> 4) | ((second >> 2) & 0x30)], 1).unsqueeze(-1)
    return Parts(codes, _half(blocks, 0) * scales.float(), _half(blocks, 2) * minimums.float())


def _unpack_q6_k(blocks: torch.Tensor) -> Parts:
    """128 bytes of low 4-bit codes, 64 of high 2-bit codes, 16 signed scales, one factor."""
    codes = _fields(blocks[:, :128], 4, sections=2)  # [blocks, 256]
    codes |= _fields(blocks[:, 128:192], 2, sections=2) << 4
    scales = blocks[:, 192:208, None].view(torch.int8)  # [blocks, 16, 1]
    return Parts(_signed(codes, 32).view(-1, 16, 16), _half(blocks, 208) * scales.float())


def _layouts() -> Iterator[BlockLayout]:
    plain = partial(_unpack_32, has_minimum=False)
    shifted = partial(_unpack_32, has_minimum=True)
    yield BlockLayout("Q4_0", 32, 18, (0,), partial(plain, has_fifth_bit=False))
    yield BlockLayout("Q4_1", 32, 20, (0, 2), partial(shifted, has_fifth_bit=False))
    yield BlockLayout("Q5_0", 32, 22, (0,), partial(plain, has_fifth_bit=True))
    yield BlockLayout("Q5_1", 32, 24, (0, 2), partial(shifted, has_fifth_bit=True))
    yield BlockLayout("Q8_0", 32, 34, (0,), _unpack_q8_0)
    yield BlockLayout("IQ4_NL", 32, 18, (0,), _unpack_iq4_nl)
    yield BlockLayout("IQ4_XS", 256, 136, (0,), _unpack_iq4_xs)
    yield BlockLayout("Q2_K", 256, 84, (80, 82), _unpack_q2_k)
    yield BlockLayout("Q3_K", 256, 110, (108,), _unpack_q3_k)
    yield BlockLayout("Q4_K", 256, 144, (0, 2), _unpack_q4_k)
    yield BlockLayout("Q5_K", 256, 176, (0, 2), _unpack_q5_k)
    yield BlockLayout("Q6_K", 256, 210, (208,), _unpack_q6_k)


BLOCK_LAYOUTS: Mapping[str, BlockLayout] = MappingProxyType({x.name: x for x in _layouts()})
