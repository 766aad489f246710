"""Rotary position embedding (arXiv 2104.09864), rotate-half layout: first half with second half."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.kernels.registry import Arguments, Op


def _reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos = cos[:, None, :].to(x.dtype)  # [tokens, 1, head_dim / 2]
    sin = sin[:, None, :].to(x.dtype)  # [tokens, 1, head_dim / 2]
    first, second = x.chunk(2, dim=-1)  # [tokens, heads, head_dim / 2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _shape(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for tokens, heads, head_dim in ((1, 1, 2), (3, 2, 64), (5, 14, 128)):
        x = torch.randn(tokens, heads, head_dim, generator=generator)
        angles = torch.rand(tokens, head_dim // 2, generator=generator) * 1e4
        yield x, angles.cos(), angles.sin()
        yield x.to(torch.bfloat16), angles.cos(), angles.sin()


rotary = Op(
    name="rotary",
    schema="(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    reference=_reference,
    shape=_shape,
    cases=_cases,
)
