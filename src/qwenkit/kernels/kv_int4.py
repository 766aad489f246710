"""Keys and values in four bits: the bytes that a cache keeps of one head of one token.

A row is cut into groups of 32 numbers, the last one perhaps with fewer. A group is 20 bytes:

    bytes 0–1    scale, bf16
    bytes 2–3    minimum, bf16
    bytes 4–19   codes; byte 4 + i holds that of number i in its low half, of number 16 + i in its
                 high half

and stands for code · scale + minimum. The minimum is the smallest number, rounded down, so that no
number lies below what codes reach; codes are 0 where the row has no number. Scale and minimum are
NaN, and so is all that the group stands for, where its numbers are not finite or span more than
fp32 has.
"""

from __future__ import annotations

import torch

GROUP = 32  # numbers
GROUP_BYTES = 20
_HEAD_BYTES = 4
_TOP = 15
_NAN = 0x7FC0  # of bf16


def row_bytes(head_dim: int) -> int:
    """Bytes of one head of one token."""
    return -(-head_dim // GROUP) * GROUP_BYTES


def quantize(rows: torch.Tensor) -> torch.Tensor:
    """fp32 [..., head_dim] to uint8 [..., row_bytes(head_dim)]."""
    head_dim = rows.shape[-1]
    groups = -(-head_dim // GROUP)
    places = torch.arange(groups * GROUP, device=rows.device)
    x = rows[..., places.clamp(max=head_dim - 1)].view(*rows.shape[:-1], groups, GROUP)
    minimum = _rounded_down(x.amin(-1) + 0.0)  # [..., groups]; -0 would have other bytes
    span = x.amax(-1) - minimum
    is_number = span.isfinite()
    scale = (span / _TOP).to(torch.bfloat16)
    quotients = (x - minimum[..., None]) / scale.float()[..., None]
    codes = quotients.nan_to_num(nan=0.0).round().clamp(0, _TOP).to(torch.uint8)
    codes = torch.where(is_number[..., None] & (places < head_dim).view(groups, GROUP), codes, 0)
    head = torch.stack((scale, minimum.to(torch.bfloat16)), -1).view(torch.int16)
    head = torch.where(is_number[..., None], head, _NAN).to(torch.int16)  # [..., groups, 2]
    low, high = codes[..., : GROUP // 2], codes[..., GROUP // 2 :]
    return torch.cat((head.view(torch.uint8), low | high << 4), -1).flatten(-2)


def _rounded_down(x: torch.Tensor) -> torch.Tensor:
    """The largest bf16 numbers that are not above x, as fp32."""
    bits = x.view(torch.int32)
    return ((bits + torch.where(bits < 0, 0xFFFF, 0).to(torch.int32)) & -0x10000).view(
        torch.float32
    )


def scales_and_minima(stored: torch.Tensor) -> torch.Tensor:
    """Those of every group of uint8 [..., row_bytes(head_dim)], bf16 [..., groups, 2]."""
    groups = stored.reshape(*stored.shape[:-1], -1, GROUP_BYTES)  # [..., groups, 20]
    return groups[..., :_HEAD_BYTES].contiguous().view(torch.bfloat16)


def dequantize(stored: torch.Tensor, head_dim: int) -> torch.Tensor:
    """uint8 [..., row_bytes(head_dim)] to what it stands for, fp32 [..., head_dim]."""
    head = scales_and_minima(stored).float()
    codes = stored.reshape(*stored.shape[:-1], -1, GROUP_BYTES)[..., _HEAD_BYTES:]
    numbers = torch.cat((codes & 15, codes >> 4), -1)  # [..., groups, 32]
    rows = numbers * head[..., :1] + head[..., 1:]
    return rows.flatten(-2)[..., :head_dim]
