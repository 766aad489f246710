"""What a LoRA adapter adds to the output of a linear layer (arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.kernels.packed import Packed, interleave, unpack
from qwenkit.kernels.registry import Arguments, Op


def _reference(
    y: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    rank: int,
) -> None:
    """Adds (x Dᵀ) Uᵀ + bias to y [tokens, rows] in place, x being [tokens, columns].

    D [rank, columns] and U [rows, rank] are fp32 panels, as `kernels.packed.Packed` has them, U
    with the adapter's scaling in it; `bias` is fp32 [rows]. Multiplies in fp32.
    """
    rows, columns = y.shape[1], x.shape[1]
    wide_down = unpack(Packed("fp32", rank, columns, down), torch.float32)
    wide_up = unpack(Packed("fp32", rows, rank, up), torch.float32)
    added = x.to(torch.float32) @ wide_down.T @ wide_up.T  # [tokens, rows]
    if bias is not None:
        added = added + bias
    y.add_(added)


def _shape(
    y: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    rank: int,
) -> None:
    return None


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def panels(rows: int, columns: int) -> torch.Tensor:
        return interleave(random(rows, columns).view(torch.uint8))

    for tokens, columns, rank, rows in (
        (1, 1, 1, 1),
        (1, 96, 8, 48),
        (3, 101, 3, 37),
        (21, 64, 16, 130),
        (34, 40, 65, 16),
    ):
        y, x = random(tokens, rows), random(tokens, columns)
        matrices = panels(rank, columns), panels(rows, rank)
        yield y, x, *matrices, None, rank
        yield random(2 + tokens, rows)[2:], x, *matrices, random(rows), rank
        yield y.to(torch.bfloat16), x.to(torch.bfloat16), *matrices, random(rows), rank
        yield y[:0], x[:0], *matrices, None, rank


add_low_rank = Op(
    name="add_low_rank",
    schema="(Tensor(a!) y, Tensor x, Tensor down, Tensor up, Tensor? bias, int rank) -> ()",
    reference=_reference,
    shape=_shape,
    cases=_cases,
    bf16_tolerance=2**-8,  # half a unit in the last place of the largest
)
