"""Plain numbers to GGML's types of sixteen uneven levels: IQ4_NL and IQ4_XS.

Each group of 32 numbers gets the scale with the least error (`ggml_search`). IQ4_XS then rounds the
scales of eight groups to six bits each, and the codes once more against those. Layouts:
`qwenkit.kernels.blocks`; the bytes are equal to llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from qwenkit.formats.ggml_pack import half_bytes, pack_fields
from qwenkit.formats.ggml_search import (
    Importance,
    block_squares,
    by_block,
    by_group,
    first_extreme,
    in_turn,
    nearest,
    nearest_level,
    over,
    search_levels,
)


def _quantize_iq4_nl(x: torch.Tensor, importance: Importance | None) -> torch.Tensor:
    """The nearest of sixteen uneven levels."""
    numbers = x.t().contiguous()  # [32, blocks]
    if importance is None:
        weights = numbers * numbers
    else:
        weights = importance.by_group(numbers, in_turn(numbers * numbers) * (2 / 32))
    scale = search_levels(numbers, weights)
    inverse = torch.where(scale != 0, over(1.0, scale), 0.0)
    codes = nearest_level(inverse * numbers).t().to(torch.uint8)
    return torch.cat([half_bytes(scale.unsqueeze(1)), pack_fields(codes, 4, sections=1)], 1)


def _quantize_iq4_xs(x: torch.Tensor, importance: Importance | None) -> torch.Tensor:
    """IQ4_XS: fp32 [blocks, 256] to uint8 [blocks, 136]: IQ4_NL's levels under 6-bit scales."""
    blocks = len(x)
    grouped = by_group(x, 32)
    if importance is None:
        weights = grouped * grouped
    else:
        mean = block_squares(x) * (2 / 256)
        weights = importance.by_group(grouped, mean)
    scales = by_block(search_levels(grouped, weights), blocks)  # [8, blocks]
    factor = -first_extreme(scales) / 32  # [blocks]
    inverse = torch.where(factor != 0, over(1.0, factor), 0.0)
    scale_codes = nearest(inverse * scales).clamp_(-32, 31)  # [8, blocks]
    step = (factor * scale_codes).t().flatten()  # [groups], not of the stored half
    inverse_step = torch.where(step != 0, over(1.0, step), 0.0)
    codes = nearest_level(inverse_step * grouped)  # [32, groups]
    flat = codes.t().reshape(blocks, 256).to(torch.uint8)
    raised = (scale_codes + 32).t().to(torch.uint8)  # [blocks, 8]
    high = pack_fields(raised >> 4, 2, sections=2)
    low = pack_fields(raised & 0xF, 4, sections=4)
    packed = pack_fields(flat, 4, sections=8)
    return torch.cat([half_bytes(factor.unsqueeze(1)), high, low, packed], 1)


LEVEL_QUANTIZERS: Mapping[str, Callable[[torch.Tensor, Importance | None], torch.Tensor]] = {
    "IQ4_NL": _quantize_iq4_nl,
    "IQ4_XS": _quantize_iq4_xs,
}
