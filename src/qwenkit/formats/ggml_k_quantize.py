"""Plain numbers to GGML's K-quants: blocks of 256 in groups whose scales are quantized as well.

Each group is fitted by least squares: codes are rounded for a few trial steps about the one that
spans the group's range, the best straight line through (code, number) is solved for each, and the
trial with the least squared error wins. The group scales are then rounded to the few bits the type
has for them, and the codes are rounded once more against what was really stored. The layouts are
the GGUF specification's (see `qwenkit.kernels.blocks`); the search is our own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from qwenkit.formats.ggml_pack import half_bytes, pack_fields, reciprocal

_AFFINE_TRIALS = (-0.8, -0.4, 0.0, 0.4, 0.8)  # steps more than the codes have, over the range
_SYMMETRIC_TRIALS = (-1.0, -0.5, 0.0, 0.5, 1.0)


def _fit_affine(x: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum, both at least 0, each [blocks, groups, 1], of the best
    `scale · code - minimum` with codes 0 to `top` for x [blocks, groups, width].
    """
    width = x.shape[-1]
    low, high = x.aminmax(dim=-1, keepdim=True)
    low = low.clamp(max=0.0)
    span = reciprocal(high - low)
    total = x.sum(-1, keepdim=True)
    best_scale = torch.zeros_like(low)
    best_low = low
    best_error = torch.full_like(low, torch.inf)
    shifted = x - low
    for trial in _AFFINE_TRIALS:
        codes = (shifted * (span * (top + trial))).round_().clamp_(0, top)
        first = codes.sum(-1, keepdim=True)
        second = codes.square().sum(-1, keepdim=True)
        mixed = (codes * x).sum(-1, keepdim=True)
        determinant = reciprocal(width * second - first.square())
        scale = (width * mixed - total * first) * determinant
        offset = (second * total - first * mixed) * determinant
        # Only minimums below zero can be stored; without one the line goes through zero.
        scale = torch.where(offset > 0, mixed * reciprocal(second), scale).clamp_(min=0.0)
        offset = offset.clamp_(max=0.0)
        error = (codes * scale).add_(offset).sub_(x).square_().sum(-1, keepdim=True)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_low = torch.where(better, offset, best_low)
        best_error = torch.minimum(error, best_error)
    return best_scale, -best_low


def _fit_symmetric(x: torch.Tensor, half: int) -> torch.Tensor:
    """The scale [blocks, groups, 1], of either sign, of the best `scale · code` with codes `-half`
    to `half - 1` for x [blocks, groups, width].
    """
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    span = reciprocal(extreme)
    best = torch.zeros_like(extreme)
    best_gain = torch.zeros_like(extreme)
    for trial in _SYMMETRIC_TRIALS:
        codes = (x * (span * -(half + trial))).round_().clamp_(-half, half - 1)
        mixed = (codes * x).sum(-1, keepdim=True)
        second = codes.square().sum(-1, keepdim=True)
        scale = mixed * reciprocal(second)
        gain = mixed * scale  # how much of the group's square this scale explains
        best = torch.where(gain > best_gain, scale, best)
        best_gain = torch.maximum(gain, best_gain)
    return best


def _quantize_affine(x: torch.Tensor, *, groups: int, bits: int, scale_bits: int) -> torch.Tensor:
    """Q2_K, Q4_K and Q5_K, fp32 [blocks, 256] to uint8 [blocks, block_bytes]."""
    grouped = x.view(x.shape[0], groups, -1)
    top = (1 << bits) - 1
    scales, minimums = _fit_affine(grouped, top)
    factor, scale_codes = _quantize_scales(scales, 0, (1 << scale_bits) - 1)
    factor_minimum, minimum_codes = _quantize_scales(minimums, 0, (1 << scale_bits) - 1)
    step = factor.unsqueeze(-1) * scale_codes.unsqueeze(-1)
    minimum = factor_minimum.unsqueeze(-1) * minimum_codes.unsqueeze(-1)
    codes = ((grouped + minimum) * reciprocal(step)).round_().clamp_(0, top)
    codes = codes.to(torch.uint8).flatten(1)  # [blocks, 256]
    halves = [half_bytes(factor), half_bytes(factor_minimum)]
    scale_codes, minimum_codes = scale_codes.to(torch.uint8), minimum_codes.to(torch.uint8)
    if bits == 2:
        packed = pack_fields(codes, 2, sections=2)
        return torch.cat([scale_codes | (minimum_codes << 4), packed, *halves], 1)
    low = pack_fields(codes & 0xF, 4, sections=4)
    high = [pack_fields(codes >> 4, 1, sections=1)] if bits == 5 else []
    return torch.cat([*halves, _pack_six_bits(scale_codes, minimum_codes), *high, low], 1)


def _pack_six_bits(scales: torch.Tensor, minimums: torch.Tensor) -> torch.Tensor:
    """Eight scales and eight minimums of 6 bits, uint8 [blocks, 8] each, in 12 bytes."""
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = minimums[:, :4] | (minimums[:, 4:] >> 4 << 6)
    low = (scales[:, 4:] & 0xF) | (minimums[:, 4:] << 4)
    return torch.cat([first, second, low], 1)


def _quantize_scales(
    scales: torch.Tensor, lowest: int, highest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Group scales [blocks, groups, 1] as (factor [blocks, 1], exactly a half-precision number;
    codes [blocks, groups], whole numbers from `lowest` to `highest`), all fp32.
    """
    flat = scales.squeeze(-1)
    extreme = flat.gather(1, flat.abs().argmax(1, keepdim=True))  # [blocks, 1]
    # With a signed range the extreme takes the lowest code, which reaches one further.
    factor = (extreme / (lowest or highest)).to(torch.float16).to(torch.float32)
    codes = (flat * reciprocal(factor)).round_().clamp_(lowest, highest)
    return factor, codes


def _quantize_symmetric(x: torch.Tensor, *, bits: int, scale_bits: int) -> torch.Tensor:
    """Q3_K and Q6_K, fp32 [blocks, 256] to uint8 [blocks, block_bytes]."""
    grouped = x.view(x.shape[0], 16, 16)
    half = 1 << (bits - 1)
    scale_half = 1 << (scale_bits - 1)
    scales = _fit_symmetric(grouped, half)
    factor, scale_codes = _quantize_scales(scales, -scale_half, scale_half - 1)
    step = factor.unsqueeze(-1) * scale_codes.unsqueeze(-1)
    codes = (grouped * reciprocal(step)).round_().clamp_(-half, half - 1).add_(half)
    codes = codes.to(torch.uint8).flatten(1)  # [blocks, 256]
    if bits == 6:
        low = pack_fields(codes & 0xF, 4, sections=2)
        high = pack_fields(codes >> 4, 2, sections=2)
        return torch.cat(
            [low, high, scale_codes.to(torch.int8).view(torch.uint8), half_bytes(factor)], 1
        )
    high = pack_fields(codes >> 2, 1, sections=1)
    low = pack_fields(codes & 0x3, 2, sections=2)
    return torch.cat([high, low, _pack_q3_scales(scale_codes), half_bytes(factor)], 1)


def _pack_q3_scales(codes: torch.Tensor) -> torch.Tensor:
    """Sixteen signed scales of 6 bits in 12 bytes: 8 of low nibbles, 4 of upper pairs."""
    raised = (codes + 32).to(torch.uint8)
    low = pack_fields(raised & 0xF, 4, sections=1)
    return torch.cat([low, pack_fields(raised >> 4, 2, sections=1)], 1)


K_QUANTIZERS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q2_K": partial(_quantize_affine, groups=16, bits=2, scale_bits=4),
    "Q3_K": partial(_quantize_symmetric, bits=3, scale_bits=6),
    "Q4_K": partial(_quantize_affine, groups=8, bits=4, scale_bits=6),
    "Q5_K": partial(_quantize_affine, groups=8, bits=5, scale_bits=6),
    "Q6_K": partial(_quantize_symmetric, bits=6, scale_bits=8),
}
