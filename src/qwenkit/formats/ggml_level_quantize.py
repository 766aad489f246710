"""Plain numbers to GGML's types of sixteen uneven levels: IQ4_NL and IQ4_XS.

Of a few scales about the one that puts the largest number on the last level, each refined by least
squares, the one with the least error is taken. IQ4_XS then rounds the scales of eight groups to six
bits each, and the codes once more against what was really stored. The layouts are GGML's (see
`qwenkit.kernels.blocks`); the search is our own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from qwenkit.formats.ggml_pack import half_bytes, pack_fields, reciprocal
from qwenkit.kernels.blocks import IQ4_NL_LEVELS

_LAST_LEVELS = (-142, -130, -118)  # where a trial puts the number of largest magnitude


def _quantize_iq4_nl(x: torch.Tensor) -> torch.Tensor:
    """fp32 [blocks, 32] to uint8 [blocks, 18]."""
    best = _fit(x)
    codes = _codes(x, best.to(torch.float16).float())
    return torch.cat([half_bytes(best), pack_fields(codes, 4, sections=1)], 1)


def _quantize_iq4_xs(x: torch.Tensor) -> torch.Tensor:
    """fp32 [blocks, 256] to uint8 [blocks, 136]."""
    grouped = x.view(-1, 8, 32)
    scales = _fit(grouped).squeeze(-1)  # [blocks, 8]
    extreme = scales.gather(1, scales.abs().argmax(1, keepdim=True))  # [blocks, 1]
    factor = (extreme / -32).to(torch.float16).float()
    scale_codes = (scales * reciprocal(factor)).round_().clamp_(-32, 31)
    codes = _codes(grouped, factor.unsqueeze(-1) * scale_codes.unsqueeze(-1))
    raised = (scale_codes + 32).to(torch.uint8)
    high = pack_fields(raised >> 4, 2, sections=2)
    low = pack_fields(raised & 0xF, 4, sections=4)
    return torch.cat(
        [half_bytes(factor), high, low, pack_fields(codes.flatten(1), 4, sections=8)], 1
    )


def _fit(x: torch.Tensor) -> torch.Tensor:
    """The best scale [..., 1] of `scale · level` for x [..., 32]; of either sign."""
    levels = torch.tensor(IQ4_NL_LEVELS, dtype=torch.float32, device=x.device)
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))  # [..., 1]
    best = torch.zeros_like(extreme)
    best_gain = torch.zeros_like(extreme)
    for last_level in _LAST_LEVELS:
        chosen = levels[torch.bucketize(x * (last_level * reciprocal(extreme)), _borders(x))]
        product = (x * chosen).sum(-1, keepdim=True)
        square = chosen.square().sum(-1, keepdim=True)
        gain = product.square() / square  # how much of the group's square this scale explains
        best = torch.where(gain > best_gain, product / square, best)
        best_gain = torch.maximum(gain, best_gain)
    return best


def _codes(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The code of the nearest level, uint8 of x's shape."""
    return torch.bucketize(x * reciprocal(scale), _borders(x)).to(torch.uint8)


def _borders(x: torch.Tensor) -> torch.Tensor:
    levels = torch.tensor(IQ4_NL_LEVELS, dtype=torch.float32, device=x.device)
    return (levels[1:] + levels[:-1]) / 2


LEVEL_QUANTIZERS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "IQ4_NL": _quantize_iq4_nl,
    "IQ4_XS": _quantize_iq4_xs,
}
