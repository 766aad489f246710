"""What a token's experts made of it, weighted and added up, with what every token gets."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.kernels.registry import Arguments, Op


def _reference(
    outputs: torch.Tensor,
    weights: torch.Tensor,
    places: torch.Tensor,
    shared: torch.Tensor | None,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Σ weights · outputs[places] + sigmoid(gate) · shared + residual, [tokens, width].

    `outputs` is [choices, width], sorted by expert; `weights` and `places` are [tokens, count] of
    the op choose_experts; `shared` and `residual` are [tokens, width], `gate` is [tokens, 1].
    """
    own = outputs.index_select(0, places.flatten()).view(*places.shape, outputs.shape[1])
    y = (own * weights[:, :, None]).sum(1)  # [tokens, width]
    if shared is not None and gate is not None:
        y = y + gate.sigmoid() * shared
    return y if residual is None else residual + y


def _shape(
    outputs: torch.Tensor,
    weights: torch.Tensor,
    places: torch.Tensor,
    shared: torch.Tensor | None,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return outputs.new_empty((places.shape[0], outputs.shape[1]))


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for tokens, count, width in ((1, 1, 1), (1, 8, 2048), (3, 2, 33), (20, 4, 80)):
        outputs = torch.randn(tokens * count, width, generator=generator)
        weights = torch.rand(tokens, count, generator=generator)
        places = torch.randperm(tokens * count, generator=generator).view(tokens, count)
        shared, residual = torch.randn(2, tokens, width, generator=generator)
        gate = torch.randn(tokens, 1, generator=generator)
        yield outputs, weights, places, None, None, None
        yield outputs, weights, places, shared, gate * 50, None
        yield outputs, weights, places, None, None, residual
        yield outputs, weights, places, shared, gate, residual
        yield outputs.double(), weights.double(), places, None, None, None
    yield outputs[:0], weights[:0], places[:0], None, None, None


mix_experts = Op(
    name="mix_experts",
    schema="(Tensor outputs, Tensor weights, Tensor places, Tensor? shared, Tensor? gate, "
    "Tensor? residual) -> Tensor",
    reference=_reference,
    shape=_shape,
    cases=_cases,
)
