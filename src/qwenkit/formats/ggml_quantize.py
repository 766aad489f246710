"""Plain numbers to GGML blocks: the types with blocks of 32, and the door to all of them.

Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 are round-to-nearest with the range of the block as the scale, in
the very order of roundings that llama.cpp's converter uses: the bytes are equal to its own. The
IQ4 types and the K-quants look for a scale with less error; they are ours, see
`ggml_level_quantize` and `ggml_k_quantize`.

The inverse is `qwenkit.kernels.blocks`. Knows no files and no layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from qwenkit.errors import NonFiniteError, UsageError, suggest
from qwenkit.formats.ggml_k_quantize import K_QUANTIZERS
from qwenkit.formats.ggml_level_quantize import LEVEL_QUANTIZERS
from qwenkit.formats.ggml_pack import half_bytes, pack_fields, reciprocal
from qwenkit.kernels.blocks import (
    BLOCK_LAYOUTS,
    first_nonfinite_block,
    row_chunks,
)

_LARGEST = 65504.0 * 128 * 32  # half precision's largest, times Q6_K's codes: no type goes further


def quantize_blocks(weight: torch.Tensor, block_type: str) -> torch.Tensor:
    """Quantize a matrix [rows, columns] of any float dtype to uint8 [rows, bytes_per_row].

    Works in chunks of rows, each in fp32. Raises UsageError when the type is unknown or its blocks
    do not fill a row, NonFiniteError when a number is NaN, infinite or too large for the type.
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
    result = weight.new_empty((rows, layout.bytes_per_row(columns)), dtype=torch.uint8)
    for chunk in row_chunks(rows, columns):
        numbers = weight[chunk].detach().to(torch.float32).contiguous()
        if not bool(numbers.abs().amax() <= _LARGEST):  # NaN compares false
            raise _unholdable(block_type, chunk.start, chunk.stop)
        blocks = QUANTIZERS[block_type](numbers.view(-1, layout.block_columns))
        result[chunk] = blocks.view(-1, result.shape[1])
        overflow = first_nonfinite_block(result[chunk], block_type)
        if overflow is not None:
            row = chunk.start + overflow[0]
            raise _unholdable(block_type, row, row + 1)
    return result


def _unholdable(block_type: str, first_row: int, end_row: int) -> NonFiniteError:
    return NonFiniteError(
        f"{block_type} cannot hold this matrix: among rows {first_row} to {end_row - 1} a number "
        "is NaN, infinite, or so large that the half-precision scale of its block overflows. "
        "Keep the matrix in a float type."
    )


def _quantize_q8_0(x: torch.Tensor) -> torch.Tensor:
    step = x.abs().amax(1, keepdim=True) / 127
    scaled = x * reciprocal(step)
    size = scaled.abs()
    whole = size.floor()
    whole += (2 * (size - whole)).floor()  # halves go away from zero
    codes = torch.copysign(whole, scaled).to(torch.int8)  # [blocks, 32]
    return torch.cat([half_bytes(step), codes.view(torch.uint8)], 1)


def _quantize_symmetric(x: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Q4_0 and Q5_0: the number furthest from zero gets the lowest code, which has no opposite."""
    zero = 1 << (bits - 1)
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))  # [blocks, 1]
    step = extreme / -zero
    codes = (x * reciprocal(step)).add_(zero + 0.5).to(torch.uint8).clamp_(max=2 * zero - 1)
    return torch.cat([half_bytes(step), *_code_bytes(codes, bits)], 1)


def _quantize_affine(x: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Q4_1 and Q5_1: the codes span the block's range from its minimum on."""
    top = (1 << bits) - 1
    minimum, maximum = x.aminmax(dim=1, keepdim=True)
    step = (maximum - minimum) / top
    codes = ((x - minimum) * reciprocal(step)).add_(0.5).to(torch.uint8).clamp_(max=top)
    return torch.cat([half_bytes(step), half_bytes(minimum), *_code_bytes(codes, bits)], 1)


def _code_bytes(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    nibbles = pack_fields(codes & 0xF, 4, sections=1)
    return [nibbles] if bits == 4 else [pack_fields(codes >> 4, 1, sections=4), nibbles]


Quantizer = Callable[[torch.Tensor], torch.Tensor]  # fp32 [blocks, columns] → [blocks, bytes]

QUANTIZERS: Mapping[str, Quantizer] = {
    "Q4_0": partial(_quantize_symmetric, bits=4),
    "Q4_1": partial(_quantize_affine, bits=4),
    "Q5_0": partial(_quantize_symmetric, bits=5),
    "Q5_1": partial(_quantize_affine, bits=5),
    "Q8_0": _quantize_q8_0,
    **LEVEL_QUANTIZERS,
    **K_QUANTIZERS,
}
