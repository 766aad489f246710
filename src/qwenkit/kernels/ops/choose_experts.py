"""From a router's logits to the experts of every token, and the order in which experts work."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.kernels.registry import Arguments, Op

Routes = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _reference(logits: torch.Tensor, count: int, normalise: bool) -> Routes:
    """logits [tokens, experts] to (weights, chosen, order, places, ends).

    `weights` in logits' dtype and `chosen` int64, both [tokens, count]: each token's `count` best
    experts by softmax, best first, of equal ones the first; with `normalise` the weights of a token
    add up to one. Sorted by expert, choice i is of token `order[i]` (int64 [tokens * count]), and
    the choices of expert e end at `ends[e]` (int64 [experts]); `places` (int64 [tokens, count])
    says where each choice went.
    """
    # fp32, as the models were trained; fp64 stays fp64
    dtype = torch.promote_types(logits.dtype, torch.float32)
    share = torch.softmax(logits, -1, dtype=dtype)  # [tokens, experts]
    best = share.sort(dim=-1, descending=True, stable=True)
    weights, chosen = best.values[:, :count], best.indices[:, :count].contiguous()
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    by_expert, order = chosen.flatten().sort(stable=True)  # [tokens * count] each
    every_expert = torch.arange(logits.shape[1], device=logits.device)
    ends = torch.searchsorted(by_expert, every_expert, right=True)
    places = order.argsort().view(chosen.shape)
    return weights.to(logits.dtype).contiguous(), chosen, order // count, places, ends


def _shape(logits: torch.Tensor, count: int, normalise: bool) -> Routes:
    tokens, experts = logits.shape
    return (
        logits.new_empty((tokens, count)),
        logits.new_empty((tokens, count), dtype=torch.int64),
        logits.new_empty((tokens * count,), dtype=torch.int64),
        logits.new_empty((tokens, count), dtype=torch.int64),
        logits.new_empty((experts,), dtype=torch.int64),
    )


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for tokens, experts, count in ((1, 1, 1), (1, 64, 8), (5, 6, 6), (23, 60, 4), (70, 128, 8)):
        logits = torch.randn(tokens, experts, generator=generator)
        for normalise in (False, True):
            yield logits, count, normalise
            yield logits * 50, count, normalise  # all weight on one
    yield torch.zeros(3, 7), 2, True  # all equal
    yield torch.full((2, 5), torch.nan), 3, True
    yield logits.double(), 2, True
    yield logits[:0], 2, False


choose_experts = Op(
    name="choose_experts",
    schema="(Tensor logits, int count, bool normalise) -> "
    "(Tensor weights, Tensor chosen, Tensor order, Tensor places, Tensor ends)",
    reference=_reference,
    shape=_shape,
    cases=_cases,
)
