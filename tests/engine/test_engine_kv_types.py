"""Whatever keys and values are kept in: a request's tokens and logprobs on the native kernels are
the same bits alone, beside others and in any chunks.
"""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

from fakes import ByteTokenizer, tiny_model
from qwenkit.engine.engine import Engine
from qwenkit.engine.kv import NAMED_DTYPES
from qwenkit.engine.request import Request
from qwenkit.engine.settings import EngineSettings
from qwenkit.formats.packed import PackedWeight
from qwenkit.kernels import cpu
from qwenkit.layers.linear import Linear
from qwenkit.models import qwen2
from qwenkit.types.embedding import EmbeddingParams
from qwenkit.types.events import FinishEvent, TokenEvent
from qwenkit.types.sampling import SamplingParams

Answer = list[tuple[int, float | None] | tuple[float, ...]]


@cache
def model() -> qwen2.Model:
    """With outliers in the keys of one of three layers, so that caches are mixed; its products are
    native, as where a model is loaded.
    """
    made = tiny_model(hidden_size=128, num_attention_heads=4, num_hidden_layers=3)
    made.model.layers[1].self_attn.k_proj.bias[5] = 100.0  # type: ignore[union-attr, index]
    for linear in [module for module in made.modules() if isinstance(module, Linear)]:
        assert isinstance(linear.weight, torch.nn.Parameter)
        packed = PackedWeight.round_to_nearest(linear.weight.detach(), "fp32")
        del linear.weight
        linear.weight = packed
    return made


def requests() -> list[Request]:
    choose = random.Random(3)
    made = []
    for number in range(10):
        ids = tuple(choose.randrange(256) for _ in range(choose.choice((1, 7, 40, 90))))
        sampling = SamplingParams(
            temperature=choose.choice((0.0, 0.9)),
            max_tokens=choose.choice((3, 12)),
            seed=number,
            logprobs=2,
            ignore_eos=True,
        )
        wanted = EmbeddingParams(pooling="mean") if number % 5 == 4 else None
        made.append(Request(str(number), ids, sampling, embedding=wanted))
    return made


def served(kind: str, asked: list[Request], max_batch_tokens: int) -> dict[str, Answer]:
    settings = EngineSettings(
        block_tokens=16,
        kv_cache_tokens=272,  # a quarter of what all need
        max_batch_tokens=max_batch_tokens,
        max_sequences=8,
        kv_dtype=kind,
    )
    engine = Engine(model(), ByteTokenizer(), settings, stop_token_ids=(), context_tokens=256)
    for request in asked:
        engine.add(request)
    answers: dict[str, Answer] = {request.id: [] for request in asked}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, TokenEvent):
                answers[event.request_id].append((event.token_id, event.logprob))
            elif event.embedding is not None:
                answers[event.request_id].append(event.embedding)
            assert not isinstance(event, FinishEvent) or event.error is None
    return answers


@pytest.mark.parametrize("kind", NAMED_DTYPES)
def test_answers_are_the_same_bits_in_any_company(kind: str) -> None:
    if cpu.register().variant is None:
        pytest.skip("no native kernels here")
    asked = requests()
    alone = {
        name: answer for request in asked for name, answer in served(kind, [request], 512).items()
    }
    assert all(alone.values())
    for max_batch_tokens in (16, 64, 512):
        assert served(kind, asked, max_batch_tokens) == alone
    torch.set_num_threads(2)
    try:
        assert served(kind, asked, 64) == alone
    finally:
        torch.set_num_threads(1)
