"""Long context through the engine: decided once for each request, kept for its life, reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from serving import finish, request, run, tokens

from fakes import ByteTokenizer, tiny_model
from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Request
from qwenkit.engine.settings import EngineSettings
from qwenkit.errors import RequestError
from qwenkit.layers.attention import PackedCausal
from qwenkit.layers.position import Rotary, extended
from qwenkit.models import qwen2
from qwenkit.types.events import TokenEvent
from qwenkit.types.extension import NO_EXTENSION, Extension, RopeMode

TRAINED = 32
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


def model(scaling: dict[str, Any] | None = None) -> qwen2.Model:
    built = tiny_model(max_position_embeddings=TRAINED, rope_scaling=scaling).double()
    built.dtype = torch.float64
    return built


def served(
    scaling: dict[str, Any] | None = None,
    rope: RopeMode = "per-request",
    context: int = 4 * TRAINED,
    **settings: Any,
) -> Engine:
    return Engine(
        model(scaling),
        ByteTokenizer(),
        EngineSettings(**{"block_tokens": 4, "kv_cache_tokens": 2048, **settings}),
        stop_token_ids=(),
        context_tokens=context,
        trained_tokens=TRAINED,
        rope=rope,
    )


def prompt(seed: int, count: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(scaling: dict[str, Any] | None, ids: list[int], count: int, ext: Extension) -> list[int]:
    """Written out: the whole sequence computed again for every token, under one extension."""
    built = model(scaling)
    spec = built.config.position
    assert isinstance(spec, Rotary)
    for module in built.modules():
        if hasattr(module, "position"):
            vars(module)["position"] = extended(spec, ext)
    ids = list(ids)
    for _ in range(count):
        logits = built(torch.tensor(ids), PackedCausal([len(ids)]))
        ids.append(int(logits[-1, :258].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("scaling", [None, YARN], ids=["asked", "config"])
@pytest.mark.parametrize("settings", [{}, {"max_batch_tokens": 7, "max_sequences": 5}], ids=str)
def test_each_request_of_a_batch_has_the_smallest_sufficient_factor(
    scaling: dict[str, Any] | None, settings: dict[str, Any]
) -> None:
    factors = {"short": (5, 10, 1), "edge": (22, 10, 1), "two": (23, 10, 2), "four": (90, 10, 4)}
    requests = [
        request(name, prompt(seed, n), max_tokens=more, ignore_eos=True)
        for seed, (name, (n, more, _)) in enumerate(factors.items())
    ]
    events = run(served(scaling, **settings), *requests)
    for seed, (name, (n, more, factor)) in enumerate(factors.items()):
        expected = Extension("yarn", float(factor), TRAINED) if factor > 1 else NO_EXTENSION
        assert finish(events[name]).usage.extension == expected
        assert tokens(events[name]) == greedy(scaling, prompt(seed, n), more, expected)


def test_as_config_extends_every_request() -> None:
    ids = prompt(1, 9)
    events = run(served(YARN, "as-config"), request("a", ids, max_tokens=12, ignore_eos=True))
    expected = Extension("yarn", 4.0, TRAINED)
    assert finish(events["a"]).usage.extension == expected
    assert tokens(events["a"]) == greedy(YARN, ids, 12, expected)
    plain = greedy(None, ids, 12, NO_EXTENSION)
    assert tokens(events["a"]) != plain


@pytest.mark.parametrize("scaling", [YARN, DYNAMIC], ids=["yarn", "dynamic"])
def test_below_the_trained_length_it_is_no_extension_bit_for_bit(scaling: dict[str, Any]) -> None:
    ids, long = prompt(2, 20), prompt(3, 50)
    logprobs = {}
    for name, engine in {"plain": served(None), "extended": served(scaling)}.items():
        beside = request("long", long, max_tokens=4)  # another choice in the same batch
        events = run(engine, request("a", ids, max_tokens=12, logprobs=0, ignore_eos=True), beside)
        assert finish(events["a"]).usage.extension == NO_EXTENSION
        logprobs[name] = [e.logprob for e in events["a"] if isinstance(e, TokenEvent)]
    assert logprobs["plain"] == logprobs["extended"]


def test_an_open_end_is_planned_with_a_quarter_of_the_trained_length() -> None:
    for count, factor, most in ((24, 1, 32), (25, 2, 64), (56, 2, 64), (57, 4, 128)):
        engine = served(YARN)
        events = run(engine, request("a", prompt(1, count), max_tokens=None, ignore_eos=True))
        assert finish(events["a"]).usage.extension.factor == factor
        assert finish(events["a"]).reason == "length"
        assert count + len(tokens(events["a"])) == most


def test_a_prompt_beyond_the_allowed_length_is_one_clear_error() -> None:
    long = Request("a", tuple(prompt(1, 128)))
    with pytest.raises(RequestError, match=r"128 tokens, the context 128, .*--context"):
        served(YARN).add(long)
    with pytest.raises(RequestError, match=r"128 tokens, the context 32"):
        served(None, context=TRAINED).add(long)


@pytest.mark.parametrize("rope", ["per-request", "as-config"])
@pytest.mark.parametrize("scaling", [YARN, DYNAMIC], ids=["yarn", "dynamic"])
def test_a_choice_outlives_the_loss_of_the_cache(scaling: dict[str, Any], rope: RopeMode) -> None:
    requests = [
        request(str(seed), prompt(seed, n), max_tokens=30, ignore_eos=True)
        for seed, n in enumerate((20, 30, 40, 10))
    ]
    calm = run(served(scaling, rope), *requests)
    engine = served(scaling, rope, kv_cache_tokens=128, max_batch_tokens=9, max_sequences=6)
    pressed = run(engine, *requests)
    assert engine.status().preemptions > 0
    for one in requests:
        assert tokens(pressed[one.id]) == tokens(calm[one.id])
        assert finish(pressed[one.id]).usage == finish(calm[one.id]).usage
