"""Plain numbers to GGML blocks: the types with blocks of 32, and the door to all of them.

Without importances Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 are round-to-nearest with the range of the block
as the scale; IQ4_NL, the types with blocks of 256 (`ggml_k_quantize`) and, with importances, all
but Q8_0 look for the scale with the least error. The bytes are equal to those of llama.cpp's
`ggml_quantize_chunk`.

The inverse is `qwenkit.kernels.blocks`. Knows no files and no layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from qwenkit.errors import NonFiniteError, UsageError, suggest
from qwenkit.formats.ggml_k_quantize import K_QUANTIZERS
from qwenkit.formats.ggml_level_quantize import LEVEL_QUANTIZERS
from qwenkit.formats.ggml_pack import half_bytes, pack_fields, reciprocal
from qwenkit.formats.ggml_search import (
    Importance,
    first_highest,
    first_lowest,
    in_turn,
    search_affine,
    search_symmetric,
)
from qwenkit.kernels.blocks import BLOCK_LAYOUTS, first_nonfinite_block, row_chunks

_LARGEST = 65504.0 * 128 * 32  # half precision's largest, times Q6_K's codes: no type goes further
_ROWS_SUMMED = 4096  # rows whose squares are summed at once, a column after another


def quantize_blocks(
    weight: torch.Tensor, block_type: str, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantize a matrix [rows, columns] of any float dtype to uint8 [rows, bytes_per_row].

    `importance` fp32 [columns] says how much an error of each column counts (the mean square of
    what the column is multiplied with). Works in chunks of rows, each in fp32. Raises UsageError
    when the type is unknown, its blocks do not fill a row or an importance is negative or not
    finite, NonFiniteError when a number is NaN, infinite or too large for the type.
    """
    if block_type not in QUANTIZERS:
        raise UsageError(f"unknown block type {block_type!r}. {suggest(block_type, QUANTIZERS)}")
    layout = BLOCK_LAYOUTS[block_type]
    if weight.ndim != 2 or weight.shape[1] < 1 or weight.shape[1] % layout.block_columns:
        raise UsageError(
            f"{block_type} takes a matrix whose rows are whole blocks of {layout.block_columns} "
            f"numbers; got the shape {tuple(weight.shape)}. Choose a type with smaller blocks."
        )
    rows, columns = weight.shape
    counts = None if importance is None else _checked(importance, columns)
    result = weight.new_empty((rows, layout.bytes_per_row(columns)), dtype=torch.uint8)
    for chunk, numbers, means in _chunks(weight, block_type, has_importance=counts is not None):
        given = None
        if counts is not None:
            per_row = columns // layout.block_columns
            by_block = counts.view(per_row, -1).repeat(len(numbers), 1)
            given = Importance(by_block, means.repeat_interleave(per_row))
        blocks = QUANTIZERS[block_type](numbers.view(-1, layout.block_columns), given)
        result[chunk] = blocks.view(-1, result.shape[1])
        overflow = first_nonfinite_block(result[chunk], block_type)
        if overflow is not None:
            row = chunk.start + overflow[0]
            raise _unholdable(block_type, row, row + 1)
    return result


def _checked(importance: torch.Tensor, columns: int) -> torch.Tensor:
    if importance.shape != (columns,):
        raise UsageError(
            f"importance: got the shape {list(importance.shape)}; the matrix has {columns} columns."
        )
    counts = importance.detach().to("cpu", torch.float32)
    if not bool((counts >= 0).all() and counts.isfinite().all()):
        raise UsageError("importance: some numbers are negative, NaN or infinite.")
    return counts


def _chunks(
    weight: torch.Tensor, block_type: str, *, has_importance: bool
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Some rows at a time: which, their numbers in fp32, and where a quantizer asks for it the mean
    square of each.
    """
    rows, columns = weight.shape
    wants_means = has_importance and block_type in _MEANS_OF_ROWS
    for slab in range(0, rows, _ROWS_SUMMED):
        some = weight[slab : slab + _ROWS_SUMMED].detach()
        means = torch.zeros(len(some))
        if wants_means:
            means = in_turn(_squares(some)) / columns
        for part in row_chunks(len(some), columns):
            numbers = some[part].to("cpu", torch.float32).contiguous()
            chunk = slice(slab + part.start, slab + part.stop)
            if not bool(numbers.abs().amax() <= _LARGEST):  # NaN compares false
                raise _unholdable(block_type, chunk.start, chunk.stop)
            yield chunk, numbers, means[part]


def _squares(some: torch.Tensor) -> torch.Tensor:
    """The squares of rows in fp32, a column after another: [columns, rows]."""
    by_column = some.to("cpu", torch.float32).t().contiguous()
    return by_column * by_column


def _unholdable(block_type: str, first_row: int, end_row: int) -> NonFiniteError:
    return NonFiniteError(
        f"{block_type} cannot hold this matrix: among rows {first_row} to {end_row - 1} a number "
        "is NaN, infinite, or so large that the half-precision scale of its block overflows. "
        "Keep the matrix in a float type."
    )


def _quantize_q8_0(x: torch.Tensor, importance: Importance | None) -> torch.Tensor:
    step = x.abs().amax(1, keepdim=True) / 127
    scaled = x * reciprocal(step)
    size = scaled.abs()
    whole = size.floor()
    whole += (2 * (size - whole)).floor()  # halves go away from zero
    codes = torch.copysign(whole, scaled).to(torch.int8)  # [blocks, 32]
    return torch.cat([half_bytes(step), codes.view(torch.uint8)], 1)


def _quantize_symmetric(
    x: torch.Tensor, importance: Importance | None, *, bits: int
) -> torch.Tensor:
    """Q4_0 and Q5_0: the number furthest from zero gets the lowest code, which has no opposite."""
    zero = 1 << (bits - 1)
    if importance is None:
        extreme = x.gather(1, x.abs().argmax(1, keepdim=True))  # [blocks, 1]
        step = extreme / -zero
        codes = (x * reciprocal(step)).add_(zero + 0.5).to(torch.uint8).clamp_(max=2 * zero - 1)
    else:
        numbers = x.t().contiguous()
        found = search_symmetric(numbers, importance.by_row(numbers), zero)
        step, codes = found.scale.unsqueeze(1), found.codes.t().to(torch.uint8)
    return torch.cat([half_bytes(step), *_code_bytes(codes, bits)], 1)


def _quantize_affine(x: torch.Tensor, importance: Importance | None, *, bits: int) -> torch.Tensor:
    """Q4_1 and Q5_1: the codes span the block's range from its minimum on."""
    top = (1 << bits) - 1
    numbers = x.t().contiguous()  # [32, blocks]
    if importance is None:
        minimum = first_lowest(numbers).unsqueeze(1)
        step = (first_highest(numbers).unsqueeze(1) - minimum) / top
        codes = ((x - minimum) * reciprocal(step)).add_(0.5).to(torch.uint8).clamp_(max=top)
    else:
        weights = importance.by_row(numbers)
        found = search_affine(numbers, weights, top, first=-0.9, step=0.05, trials=37)
        assert found.low is not None
        minimum, step = found.low.unsqueeze(1), found.scale.unsqueeze(1)
        codes = found.codes.t().to(torch.uint8)
    return torch.cat([half_bytes(step), half_bytes(minimum), *_code_bytes(codes, bits)], 1)


def _code_bytes(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    nibbles = pack_fields(codes & 0xF, 4, sections=1)
    return [nibbles] if bits == 4 else [pack_fields(codes >> 4, 1, sections=4), nibbles]


# fp32 [blocks, columns], and what the columns count, to uint8 [blocks, block_bytes]
Quantizer = Callable[[torch.Tensor, Importance | None], torch.Tensor]

QUANTIZERS: Mapping[str, Quantizer] = {
    "Q4_0": partial(_quantize_symmetric, bits=4),
    "Q4_1": partial(_quantize_affine, bits=4),
    "Q5_0": partial(_quantize_symmetric, bits=5),
    "Q5_1": partial(_quantize_affine, bits=5),
    "Q8_0": _quantize_q8_0,
    **LEVEL_QUANTIZERS,
    **K_QUANTIZERS,
}
_MEANS_OF_ROWS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
