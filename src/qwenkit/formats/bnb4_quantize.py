"""Any numbers to NF4 and FP4 in blocks, as bitsandbytes rounds them on a processor."""

from __future__ import annotations

from functools import cache

import torch

from qwenkit.kernels.packed import FP4_LEVELS, NF4_LEVELS

LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}
NESTED_SIZE = 256  # of blocks whose magnitudes share a factor
_SLAB_NUMBERS = 1 << 22  # made at a time
_SMALLEST = 1e-38  # so that blocks of zeros are divided by something


def both_in_a_byte(places: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 2 n] below 16 to [n], the first of two in the upper half."""
    flat = places.flatten()
    return flat[::2] << 4 | flat[1::2]


def quantize_blocks(
    numbers: torch.Tensor, kind: str, blocksize: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Any floats [n], n even, to (places uint8 [n / 2], magnitudes fp32 [blocks])."""
    levels = torch.tensor(LEVELS[kind], device=numbers.device)
    order = levels.argsort(stable=True)
    borders = (levels[order][1:] + levels[order][:-1]) / 2
    packed, absmax = [], []
    step = _SLAB_NUMBERS // blocksize * blocksize
    for start in range(0, len(numbers), step):
        part = numbers[start : start + step].to(torch.float32)
        filled = torch.nn.functional.pad(part, (0, -len(part) % blocksize)).view(-1, blocksize)
        most = filled.abs().amax(1)
        scaled = (filled * (1 / most.clamp(min=_SMALLEST))[:, None]).clamp_(-1, 1)
        places = order[torch.bucketize(scaled, borders)].to(torch.uint8).flatten()[: len(part)]
        packed.append(both_in_a_byte(places))
        absmax.append(most)
    return torch.cat(packed), torch.cat(absmax)


@cache
def dynamic_map() -> torch.Tensor:
    """The 256 levels of magnitudes, fp32, ascending (arXiv 1511.04561): a sign, up to seven places
    of a decimal exponent, and as many bits as are left for a fraction between 0.1 and 1.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        borders = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (borders[1:] + borders[:-1]) / 2
        sizes = (10.0 ** (exponent - 6) * means).tolist()
        levels += [*sizes, *(-size for size in sizes)]
    return torch.tensor(sorted(levels))


def quantize_magnitudes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [blocks] to (places in `dynamic_map` uint8 [blocks], factors fp32 [blocks / 256])."""
    levels = dynamic_map().to(values.device)
    count = len(values)
    blocks = torch.nn.functional.pad(values, (0, -count % NESTED_SIZE)).view(-1, NESTED_SIZE)
    factors = blocks.abs().amax(1)
    scaled = blocks * (1 / factors.clamp(min=_SMALLEST))[:, None]
    places = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)
    return places.to(torch.uint8).flatten()[:count], factors
