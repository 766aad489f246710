"""The gate of SwiGLU (arXiv 2002.05202): silu(gate) · up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from qwenkit.kernels.registry import Arguments, Op


def _reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * up


def _shape(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gate)


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for tokens, width in ((1, 1), (3, 7), (2, 4864)):
        gate = torch.randn(tokens, width, generator=generator)
        up = torch.randn(tokens, width, generator=generator)
        yield gate, up
        yield gate * 100, up  # both tails of the sigmoid
        yield gate.to(torch.bfloat16), up.to(torch.bfloat16)


silu_mul = Op(
    name="silu_mul",
    schema="(Tensor gate, Tensor up) -> Tensor",
    reference=_reference,
    shape=_shape,
    cases=_cases,
)
