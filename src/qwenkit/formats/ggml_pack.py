"""Small steps that every GGML quantizer shares: codes into bytes, factors into halves."""

from __future__ import annotations

import torch


def pack_fields(codes: torch.Tensor, bits: int, *, sections: int) -> torch.Tensor:
    """Codes of `bits` bits, uint8 [blocks, numbers], to uint8 [blocks, numbers · bits / 8].

    The inverse of how `qwenkit.kernels.blocks` reads: each of the equal sections becomes as many
    bytes as it has numbers at each bit position; the first numbers are the lowest bits.
    """
    fields = codes.view(codes.shape[0], sections, 8 // bits, -1)
    packed = fields[:, :, 0].clone()  # [blocks, sections, bytes]
    for index in range(1, 8 // bits):
        packed |= fields[:, :, index] << (index * bits)
    return packed.flatten(1)


def half_bytes(x: torch.Tensor) -> torch.Tensor:
    """fp32 [blocks, n] as half precision, in bytes: uint8 [blocks, 2 n]."""
    return x.to(torch.float16).view(torch.uint8)


def reciprocal(x: torch.Tensor) -> torch.Tensor:
    """1 / x, and 0 where that is no finite number."""
    return torch.where(torch.isfinite(1 / x), 1 / x, 0.0)
