"""Embeddings: pooling by itself, and in the engine, whatever runs beside it."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from serving import MODEL, engine, finish, request, run, tokens

from qwenkit.engine.pooling import Pooler
from qwenkit.engine.request import Request
from qwenkit.errors import NonFiniteError, RequestError
from qwenkit.layers.attention import PackedCausal
from qwenkit.types.embedding import EmbeddingParams
from qwenkit.types.events import Event
from qwenkit.types.sampling import SamplingParams


def rows(count: int, size: int = 12) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(count)) * 50


def pooled(hidden: torch.Tensor, cuts: list[int], **params: Any) -> tuple[float, ...]:
    pooler = Pooler(EmbeddingParams(**params))
    for first, last in zip([0, *cuts], [*cuts, len(hidden)], strict=True):
        pooler.add(first, hidden[first:last])
    return pooler.result()


def test_the_mean_has_the_same_bits_however_rows_are_cut() -> None:
    hidden = rows(97)
    whole = pooled(hidden, [], pooling="mean", normalize=False)
    total = torch.zeros(12, dtype=torch.float64)
    for row in hidden:
        total += row.double()
    assert whole == tuple((total / 97).float().tolist())
    cut_rng = random.Random(0)
    for _ in range(20):
        cuts = sorted(cut_rng.sample(range(1, 97), cut_rng.randint(1, 40)))
        assert pooled(hidden, cuts, pooling="mean", normalize=False) == whole
    assert pooled(hidden, list(range(1, 97)), pooling="mean", normalize=False) == whole


def test_the_last_row_is_that_of_the_last_call() -> None:
    hidden = rows(9)
    assert pooled(hidden, [4], normalize=False) == tuple(hidden[-1].tolist())
    assert math.hypot(*pooled(hidden, [4])) == pytest.approx(1, abs=1e-6)
    assert pooled(hidden * 0, []) == (0.0,) * 12  # nothing has no direction


def test_rows_that_came_before_are_passed_over() -> None:
    hidden = rows(20)
    pooler = Pooler(EmbeddingParams(pooling="mean", normalize=False))
    for first, last in ((0, 8), (0, 5), (0, 12), (12, 20)):  # begun again after a preemption
        pooler.add(first, hidden[first:last])
    assert pooler.result() == pooled(hidden, [], pooling="mean", normalize=False)
    with pytest.raises(RuntimeError, match="rows from 25 on came while 20"):
        pooler.add(25, hidden)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_what_is_not_finite_has_no_embedding(pooling: str) -> None:
    hidden = rows(5)
    hidden[4, 3] = math.nan
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        pooled(hidden, [], pooling=pooling)


def test_parameters_are_checked() -> None:
    with pytest.raises(RequestError, match=r"pooling: got 'max'"):
        EmbeddingParams(pooling="max")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="normalize: expected true or false"):
        EmbeddingParams(normalize=1)  # type: ignore[arg-type]


def embedding(name: str, ids: list[int], pooling: Any, normalize: bool = True) -> Request:
    return Request(
        name,
        tuple(ids),
        SamplingParams(max_tokens=1),
        embedding=EmbeddingParams(pooling=pooling, normalize=normalize),
    )


def hidden_states(ids: list[int]) -> torch.Tensor:
    hidden: torch.Tensor = MODEL.hidden(torch.tensor(ids), PackedCausal([len(ids)]))
    return hidden


def vector(events: list[Event]) -> torch.Tensor:
    end = finish(events)
    assert end.reason == "stop"
    assert end.embedding is not None
    return torch.tensor(end.embedding)


PROMPTS = {
    f"{pooling}{n}": [(7 * i + n) % 256 for i in range(n)]
    for n in (1, 3, 30, 77)
    for pooling in ("last", "mean")
}


@pytest.mark.parametrize("max_batch_tokens", [4, 9, 512])
def test_embeddings_run_beside_answers(max_batch_tokens: int) -> None:
    """The same vectors alone and together, in any chunks, and the same answers beside them."""
    answers = [request("a", "tell me", max_tokens=9), request("b", "a longer prompt", max_tokens=5)]
    alone = run(engine(), *answers)
    served = engine(max_batch_tokens=max_batch_tokens, max_sequences=4)
    wanted = [
        embedding(name, ids, name.rstrip("0123456789"), normalize=False)
        for name, ids in PROMPTS.items()
    ]
    events = run(served, *answers, *wanted)
    for answer in answers:
        assert tokens(events[answer.id]) == tokens(alone[answer.id])
    for name, ids in PROMPTS.items():
        hidden = hidden_states(ids)
        expected = hidden.mean(0) if name.startswith("mean") else hidden[-1]
        torch.testing.assert_close(vector(events[name]).double(), expected, rtol=0, atol=1e-5)


def test_an_embedding_may_fill_the_context() -> None:
    ids = [(5 * i) % 256 for i in range(256)]
    for kv_cache_tokens in (2048, 256):
        served = engine(kv_cache_tokens=kv_cache_tokens, max_batch_tokens=100, max_sequences=4)
        wanted = [embedding(pooling, ids, pooling, normalize=False) for pooling in ("last", "mean")]
        events = run(served, *wanted)
        hidden = hidden_states(ids)
        for name, expected in (("last", hidden[-1]), ("mean", hidden.mean(0))):
            torch.testing.assert_close(vector(events[name]).double(), expected, rtol=0, atol=1e-5)
        with pytest.raises(RequestError, match=r"has 257 tokens, the context 256\. "):
            served.add(embedding("longer", [*ids, 1], "last"))


def test_embeddings_survive_the_loss_of_their_blocks() -> None:
    served = engine(kv_cache_tokens=96, max_batch_tokens=16, max_sequences=8)
    answers = [request(f"a{n}", "x" * 20, max_tokens=40) for n in range(3)]
    ids = [(3 * i) % 256 for i in range(70)]
    events = run(served, *answers, embedding("e", ids, "mean", normalize=False))
    assert served.status().preemptions > 0
    expected = hidden_states(ids).mean(0)
    torch.testing.assert_close(vector(events["e"]).double(), expected, rtol=0, atol=1e-5)


def test_an_embedding_can_be_aborted() -> None:
    served = engine(max_batch_tokens=4, max_sequences=2)
    served.add(embedding("e", list(range(50)), "mean"))
    served.step()
    end = served.abort("e")
    assert end is not None
    assert (end.reason, end.embedding) == ("abort", None)
    assert not served.has_work
