"""Root-mean-square normalisation over the last dimension (arXiv 1910.07467)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.kernels.registry import Arguments, Op


def _reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * wide.to(x.dtype)  # cast before the weight, as the original does


def _shape(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty_like(x)


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for tokens, width in ((1, 1), (3, 7), (2, 64), (5, 896)):
        weight = torch.randn(width, generator=generator)
        x = torch.randn(tokens, width, generator=generator)
        yield x, weight, 1e-6
        yield x * 1e4, weight, 1e-5  # outliers of Qwen's size
        yield torch.zeros(tokens, width), weight, 1e-6
        yield x.to(torch.bfloat16), weight.to(torch.bfloat16), 1e-6


rms_norm = Op(
    name="rms_norm",
    schema="(Tensor x, Tensor weight, float eps) -> Tensor",
    reference=_reference,
    shape=_shape,
    cases=_cases,
)
