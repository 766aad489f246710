"""Samplers to test, and the rules of sampling in plain Python."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from qwenkit.engine.sampler import Sampler
from qwenkit.types.sampling import SamplingParams

VOCAB = 151_936  # Qwen2's rows


def sampler(
    *,
    prompt: Sequence[int] = (),
    vocab_size: int = 10,
    stops: Sequence[int] = (),
    **options: Any,
) -> Sampler:
    params = SamplingParams.from_mapping(options)
    return Sampler(
        params,
        prompt_ids=prompt,
        seed=params.seed or 0,
        vocab_size=vocab_size,
        stop_ids=stops,
    )


def normal(size: int, *, seed: int) -> NDArray[numpy.float32]:
    return numpy.random.default_rng(seed).standard_normal(size, numpy.float32)


def after(chooser: Sampler, output: Sequence[int]) -> Sampler:
    """A sampler that has sampled `output` before."""
    for token in output:
        chooser.remember(token)
    return chooser


def adjusted(chooser: Sampler, row: torch.Tensor) -> Any:
    """What penalties and biases make of a row of logits."""
    scores = row.numpy().copy()
    chooser._adjust(scores)
    return scores


def listed(ids: NDArray[numpy.int64] | None, size: int) -> list[int]:
    return list(range(size)) if ids is None else ids.tolist()


def reference(
    logits: Sequence[float], prompt: Sequence[int], output: Sequence[int], params: SamplingParams
) -> dict[int, float]:
    """The probabilities of what may be sampled, one rule after the other, in plain Python."""
    scores = dict(enumerate(logits))
    for token in {*prompt, *output}:
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token, count in Counter(output).items():
        scores[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias:
        scores[token] += bias
    scores = {token: score / params.temperature for token, score in scores.items()}
    if params.top_k:
        bound = sorted(scores.values(), reverse=True)[: params.top_k][-1]
        scores = {token: score for token, score in scores.items() if score >= bound}
    best = max(scores.values())
    weights = {token: math.exp(score - best) for token, score in scores.items()}
    total, before = sum(weights.values()), 0.0
    kept: dict[int, float] = {}
    for token in sorted(weights, key=lambda t: -weights[t]):
        if params.top_p == 1 or before < params.top_p * total or not kept:
            kept[token] = weights[token]
        before += weights[token]
    kept = {token: weight for token, weight in kept.items() if weight >= params.min_p}
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}
