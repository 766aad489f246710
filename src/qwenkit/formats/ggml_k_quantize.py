"""Plain numbers to GGML's types with blocks of 256: the K-quants.

A block falls into groups whose scales are themselves codes times a factor of the block. Each group
is fitted by a search (`ggml_search`), the scales are rounded to the few bits that the type has for
them, and the codes are rounded once more against what is then stored. With importances a group's
scale is fitted by them, and so are the block's factors. Layouts: `qwenkit.kernels.blocks`; the
bytes are equal to llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from qwenkit.formats.ggml_pack import half_bytes, pack_fields
from qwenkit.formats.ggml_search import (
    Found,
    Importance,
    block_squares,
    by_block,
    by_group,
    first_extreme,
    in_turn,
    nearest,
    over,
    root,
    search_affine,
    search_positive,
    search_refined,
    search_symmetric,
)

_NO_SCALE = 1e-15
_BLOCK = 256


def _quantize_affine(x: torch.Tensor, importance: Importance | None, *, bits: int) -> torch.Tensor:
    """Q2_K, Q4_K and Q5_K: fp32 [blocks, 256] to uint8 [blocks, block_bytes]."""
    blocks, width, top = len(x), 16 if bits == 2 else 32, (1 << bits) - 1
    scale_top = 15 if bits == 2 else 63
    grouped = by_group(x, width)  # [width, groups]
    if importance is None:
        found = _search_affine(grouped, bits, top)
        largest = [by_block(part, blocks) for part in (found.scale, -_low(found))]
        pairs = [_share_out(part, bits, scale_top) for part in largest]
        factors, scale_codes = [p[0] for p in pairs], [p[1] for p in pairs]
    else:
        squares = block_squares(x)
        mean = squares / _BLOCK if bits == 2 else 2 * squares / _BLOCK
        weights = importance.by_group(grouped, mean)
        found = search_affine(grouped, weights, top, first=-0.9, step=0.05, trials=37)
        shares = by_block(in_turn(weights), blocks)
        parts = [by_block(part, blocks) for part in (found.scale, -_low(found))]
        both = [search_positive(part, shares, scale_top) for part in parts]
        factors, scale_codes = [b.scale for b in both], [b.codes for b in both]
    halves = [factor.to(torch.float16) for factor in factors]  # [blocks]
    bytes_of = [codes.t().to(torch.int32).to(torch.uint8) for codes in scale_codes]
    if bits == 2:
        packed = bytes_of[0] | (bytes_of[1] << 4)  # [blocks, 16]
        stored = [packed & 0xF, packed >> 4]
    else:
        packed = _pack_six_bits(*bytes_of)
        stored = list(bytes_of)
    step, minimum = (
        (half.float().unsqueeze(1) * codes.float()).flatten()
        for half, codes in zip(halves, stored, strict=True)
    )  # [groups]
    codes = nearest((grouped + minimum) / step).clamp_(0, top)
    codes = torch.where(step != 0, codes, found.codes)
    flat = codes.t().reshape(blocks, _BLOCK).to(torch.uint8)
    return _affine_bytes(flat, packed, halves, bits)


def _affine_bytes(
    codes: torch.Tensor, scales: torch.Tensor, halves: list[torch.Tensor], bits: int
) -> torch.Tensor:
    factors = [half_bytes(half.unsqueeze(1)) for half in halves]
    if bits == 2:
        return torch.cat([scales, pack_fields(codes, 2, sections=2), *factors], 1)
    low = pack_fields(codes & 0xF, 4, sections=4)
    high = [pack_fields(codes >> 4, 1, sections=1)] if bits == 5 else []
    return torch.cat([*factors, scales, *high, low], 1)


def _low(found: Found) -> torch.Tensor:
    assert found.low is not None
    return found.low


def _search_affine(grouped: torch.Tensor, bits: int, top: int) -> Found:
    if bits == 2:
        return search_affine(
            grouped, grouped.abs(), top, first=-0.5, step=0.1, trials=16, absolute=True
        )
    mean = root(in_turn(grouped * grouped) / len(grouped))
    first, trials = (-1.0, 21) if bits == 4 else (-0.5, 16)
    return search_affine(grouped, mean + grouped.abs(), top, first=first, step=0.1, trials=trials)


def _share_out(scales: torch.Tensor, bits: int, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Group scales [groups, blocks] as a factor [blocks] and codes [groups, blocks]."""
    largest = scales.amax(0)
    largest = torch.where(largest > 0, largest, 0.0)  # nor -0
    inverse = torch.where(largest > 0, over(float(top), largest), 0.0)
    codes = nearest(inverse * scales)
    codes = torch.where(codes < 0, codes + 256, codes)  # as an unsigned byte
    return largest / top, codes if bits == 2 else codes.clamp_(max=top)


def _pack_six_bits(scales: torch.Tensor, minimums: torch.Tensor) -> torch.Tensor:
    """Eight scales and eight minimums of 6 bits, uint8 [blocks, 8] each, in 12 bytes."""
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = minimums[:, :4] | (minimums[:, 4:] >> 4 << 6)
    low = (scales[:, 4:] & 0xF) | (minimums[:, 4:] << 4)
    return torch.cat([first, second, low], 1)


def _quantize_q3_k(x: torch.Tensor, importance: Importance | None) -> torch.Tensor:
    """Q3_K: fp32 [blocks, 256] to uint8 [blocks, 110]."""
    blocks = len(x)
    grouped = by_group(x, 16)
    if importance is None:
        found = search_refined(grouped, 4)
        scales = by_block(found.scale, blocks)  # [16, blocks]
        inverse = over(-32.0, first_extreme(scales))
        scale_codes = nearest(inverse * scales).clamp_(-32, 31) + 32
        has_scale = scales.abs().amax(0) > 0
        scale_codes = torch.where(has_scale, scale_codes, 0.0)
        factor = torch.where(has_scale, over(1.0, inverse), 0.0)
    else:
        mean = 2 * block_squares(x) / _BLOCK
        weights = importance.by_group(grouped, mean)
        found = search_symmetric(grouped, weights, 4)
        scales, shares = by_block(found.scale, blocks), by_block(in_turn(weights), blocks)
        outer = search_symmetric(scales, shares, 32)
        scale_codes, factor = outer.codes, outer.scale
    half = factor.to(torch.float16)
    step = (half.float() * (scale_codes - 32)).t().flatten()  # [groups]
    codes = torch.where(step != 0, nearest(grouped / step).clamp_(-4, 3) + 4, found.codes)
    flat = codes.t().reshape(blocks, _BLOCK).to(torch.uint8)
    raised = scale_codes.t().to(torch.uint8)  # [blocks, 16]
    nibbles = pack_fields(raised & 0xF, 4, sections=1)
    pairs = pack_fields(raised >> 4, 2, sections=1)
    high = pack_fields(flat >> 2, 1, sections=1)
    low = pack_fields(flat & 0x3, 2, sections=2)
    return torch.cat([high, low, nibbles, pairs, half_bytes(half.unsqueeze(1))], 1)


def _quantize_q6_k(x: torch.Tensor, importance: Importance | None) -> torch.Tensor:
    """Q6_K: fp32 [blocks, 256] to uint8 [blocks, 210]."""
    blocks = len(x)
    grouped = by_group(x, 16)
    weights = grouped * grouped if importance is None else importance.of_groups(16)
    found = search_symmetric(grouped, weights, 32)
    scales = by_block(found.scale, blocks)  # [16, blocks]
    inverse = over(-128.0, first_extreme(scales))
    has_scale = scales.abs().amax(0) >= _NO_SCALE
    scale_codes = nearest(inverse * scales).clamp_(max=127)
    scale_codes = torch.where(has_scale, scale_codes, 0.0).t().to(torch.int8)  # [blocks, 16]
    half = torch.where(has_scale, over(1.0, inverse), 0.0).to(torch.float16)
    step = (half.float().unsqueeze(1) * scale_codes.float()).flatten()  # [groups]
    codes = torch.where(step != 0, nearest(grouped / step).clamp_(-32, 31) + 32, found.codes)
    flat = codes.t().reshape(blocks, _BLOCK)
    flat = torch.where(has_scale.unsqueeze(1), flat, 0.0).to(torch.uint8)
    low = pack_fields(flat & 0xF, 4, sections=2)
    high = pack_fields(flat >> 4, 2, sections=2)
    return torch.cat(
        [low, high, scale_codes.contiguous().view(torch.uint8), half_bytes(half.unsqueeze(1))], 1
    )


K_QUANTIZERS: Mapping[str, Callable[[torch.Tensor, Importance | None], torch.Tensor]] = {
    "Q2_K": partial(_quantize_affine, bits=2),
    "Q3_K": _quantize_q3_k,
    "Q4_K": partial(_quantize_affine, bits=4),
    "Q5_K": partial(_quantize_affine, bits=5),
    "Q6_K": _quantize_q6_k,
}
