"""Four bits a number: what the bytes stand for, written out, and how near that is."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from qwenkit.kernels import kv_int4


def written_out(stored: bytes, head_dim: int) -> list[float]:
    """The numbers of one row, by the layout's description."""
    numbers: list[float] = []
    for start in range(0, len(stored), 20):
        group = stored[start : start + 20]
        scale, minimum = (struct.unpack("<f", b"\0\0" + group[at : at + 2])[0] for at in (0, 2))
        codes = [byte & 15 for byte in group[4:]] + [byte >> 4 for byte in group[4:]]
        numbers += [code * scale + minimum for code in codes]
    return numbers[:head_dim]


@pytest.mark.parametrize("head_dim", [2, 31, 64, 80, 128])
def test_bytes_stand_for_numbers_within_half_a_step(head_dim: int) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    rows = torch.randn(50, 3, head_dim, generator=generator) * 3 + torch.tensor([[0], [40], [-40]])
    stored = kv_int4.quantize(rows)
    assert stored.shape == (50, 3, kv_int4.row_bytes(head_dim))
    back = kv_int4.dequantize(stored, head_dim)
    assert back[7, 2].tolist() == pytest.approx(written_out(bytes(stored[7, 2].tolist()), head_dim))
    for first in range(0, head_dim, 32):
        part = rows[..., first : first + 32]
        low = part.amin(-1, keepdim=True)
        step = (part.amax(-1, keepdim=True) - low + low.abs() * 2**-7) / 15
        error = (back[..., first : first + 32] - part).abs()
        assert (error <= step * 0.54 + 1e-6).all()  # half a step; 15 steps of a rounded scale


def test_equal_numbers_come_back_as_they_are() -> None:
    rows = torch.tensor([0.0, -0.0, 2.5, -7.0])[:, None].expand(4, 64).contiguous()
    assert torch.equal(kv_int4.dequantize(kv_int4.quantize(rows), 64), rows)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_breaks_its_group_and_no_other(broken: float) -> None:
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    rows[1, 40] = broken
    back = kv_int4.dequantize(kv_int4.quantize(rows), 64)
    assert back[1, 32:].isnan().all()
    back[1, 32:] = 0
    assert back.isfinite().all()
