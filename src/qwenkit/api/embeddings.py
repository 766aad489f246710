"""Texts to vectors, asked of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy

from qwenkit.api.inputs import MakeRequest, Options, Prompts, several_prompts
from qwenkit.engine.request import Request
from qwenkit.errors import QwenkitError
from qwenkit.types.embedding import EmbeddingParams, Pooling
from qwenkit.types.events import FinishEvent
from qwenkit.types.sampling import SamplingParams

Vectors = numpy.ndarray[tuple[int, int], numpy.dtype[numpy.float32]]


def embedding_requests(
    make: MakeRequest, prompts: str | Prompts, pooling: str, normalize: bool, options: Options
) -> list[Request]:
    """One request for each text or id list."""
    wanted = EmbeddingParams(pooling=cast(Pooling, pooling), normalize=normalize)
    several = [prompts] if isinstance(prompts, str) else several_prompts(prompts)
    plain = SamplingParams(max_tokens=1, seed=0)  # nothing is sampled
    return [replace(make(prompt, plain, options), embedding=wanted) for prompt in several]


def vectors(finished: Sequence[FinishEvent], hidden_size: int) -> Vectors:
    """fp32 [requests, hidden_size]. Raises QwenkitError for a request that did not end well."""
    for finish in finished:
        if finish.embedding is None:
            raise QwenkitError(finish.error or f"a request ended early: {finish.reason}.")
    rows = [finish.embedding for finish in finished]
    return numpy.array(rows, numpy.float32).reshape(len(rows), hidden_size)
