"""Guessed tokens: the output is what it would be without, in fewer steps where guesses are good."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import MODEL, Wrapped, engine, finish, request, run, text, tokens

from fakes import EOS, ByteTokenizer, tiny_model
from qwenkit.engine.draft_model import DraftModel
from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Request
from qwenkit.engine.runner import Runner
from qwenkit.engine.settings import EngineSettings
from qwenkit.engine.speculative import DraftLength, PromptLookup
from qwenkit.errors import UsageError
from qwenkit.types.events import FinishEvent, TokenEvent

OTHER = tiny_model(1).double()
OTHER.dtype = torch.float64


def draft_model(model: Any, **sizes: Any) -> DraftModel:
    usual = {"num_blocks": 600, "block_tokens": 4}
    cache = usual | {name: sizes.pop(name) for name in usual if name in sizes}
    runner = Runner(model, **cache, device=torch.device("cpu"), reference_ops=False)
    limits = {"context_tokens": 256, "vocab_size": 258, "cost": 0.0}
    return DraftModel(runner, **cache, **(limits | sizes))


def with_drafter(drafter: Any, model: Any = MODEL, **changes: Any) -> Engine:
    return Engine(
        model,
        ByteTokenizer(),
        EngineSettings(**{"block_tokens": 4, "kv_cache_tokens": 2048, **changes}),
        stop_token_ids=(EOS, 9999),
        context_tokens=256,
        drafter=drafter,
    )


def mixed(count: int) -> list[Request]:
    """Requests that repeat themselves and random ones, with every way to sample and to end."""
    generator = random.Random(3)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 0.8, "top_p": 0.3, "presence_penalty": 0.5},
        {"repetition_penalty": 1.1, "stop": ("a",)},
        {"min_tokens": 5, "frequency_penalty": 0.1},
    ]
    requests = []
    for i in range(count):
        phrase = generator.choices(range(256), k=generator.randint(2, 9))
        prompt = phrase * generator.randint(1, 6)
        options = kinds[i % len(kinds)] | {"max_tokens": generator.randint(1, 60)}
        requests.append(
            request(str(i), prompt, **options, seed=i, logprobs=2, ignore_eos=bool(i % 2))
        )
    return requests


def assert_same(served: Engine, requests: list[Request]) -> None:
    expected = {r.id: run(engine(prefix_cache=False), r)[r.id] for r in requests}
    together = run(served, *requests)
    for r in requests:
        ours, alone = together[r.id], expected[r.id]
        assert tokens(ours) == tokens(alone)
        assert text(ours) == text(alone)
        assert (finish(ours).reason, finish(ours).text) == (
            finish(alone).reason,
            finish(alone).text,
        )
        for one, other in zip(ours[:-1], alone[:-1], strict=True):
            assert isinstance(one, TokenEvent)
            assert isinstance(other, TokenEvent)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


@pytest.mark.parametrize("sizes", [{}, {"kv_cache_tokens": 256, "max_batch_tokens": 64}], ids=str)
def test_prompt_lookup_changes_no_output(sizes: dict[str, Any]) -> None:
    served = engine(speculation="prompt-lookup", **sizes)
    assert_same(served, mixed(20))
    status = served.status()
    assert 0 < status.accepted_tokens <= status.drafted_tokens


@pytest.mark.parametrize("model", [MODEL, OTHER], ids=["itself", "another"])
@pytest.mark.parametrize("num_blocks", [600, 40], ids=["room", "little room"])
def test_a_draft_model_changes_no_output(model: Any, num_blocks: int) -> None:
    drafter = draft_model(model, num_blocks=num_blocks)
    served = with_drafter(drafter)
    assert_same(served, mixed(20))
    status = served.status()
    assert status.drafted_tokens > 0
    if model is MODEL:  # greedy guesses of the model itself
        assert status.accepted_tokens > 0.3 * status.drafted_tokens
    assert drafter._pool.free_blocks == num_blocks


def steps(served: Engine, one: Request) -> int:
    served.add(one)
    count = 0
    while served.has_work:
        served.step()
        count += 1
    return count


def test_good_guesses_save_steps() -> None:
    def say_the_next_letter(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        letters = ids[len(ids) - len(logits) :] - ord("a")
        return torch.full_like(logits, -5.0).scatter(
            1, ((letters + 1) % 8 + ord("a"))[:, None], 5.0
        )

    alphabet = Wrapped(say_the_next_letter)
    repeating = request("a", list(b"abcdefghabc"), max_tokens=100)
    assert steps(engine(alphabet), repeating) == 100
    assert steps(engine(alphabet, speculation="prompt-lookup"), repeating) < 20
    assert steps(with_drafter(draft_model(MODEL)), repeating) < 60


def test_a_draft_model_stays_within_its_context() -> None:
    served = with_drafter(draft_model(MODEL, context_tokens=20))
    assert_same(served, [request("a", "x" * 10, max_tokens=40, ignore_eos=True)])
    assert 0 < served.status().drafted_tokens <= 15


def test_what_no_row_is_worth_is_not_guessed() -> None:
    length = DraftLength()
    assert length.best(1) > length.best(4) > length.best(40) == 0
    for _ in range(20):
        length.observe(4, 0)
    assert length.best(1) == 0
    waited = 0
    while not length.best(1):
        waited += 1
    assert 10 < waited < 100  # it is tried again now and then, with one
    assert length.best(1) == 1
    for _ in range(20):
        length.observe(8, 8)
    assert length.best(1) == 15
    assert DraftLength(guess_cost=0.5).best(1) < DraftLength().best(1)


def test_guesses_follow_the_longest_ending_that_was_there_before() -> None:
    lookup = PromptLookup()
    prompt = [1, 2, 3, 4, 5, 9, 2, 3, 4, 6, 7, 0, 1, 2, 3, 4]
    assert lookup.propose([("a", prompt)], {"a": 2}) == {"a": (5, 9)}
    assert lookup.propose([("b", [7, *prompt[1:]])], {"b": 2}) == {"b": (6, 7)}
    assert lookup.propose([("c", prompt[6:])], {"c": 2}) == {"c": (6, 7)}
    assert lookup.propose([("a", prompt)], {"a": 0}) == {}
    assert lookup.propose([("d", [1]), ("e", [1, 2, 3])], {"d": 5, "e": 5}) == {}
    lookup.forget("a")
    lookup.forget("never there")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 59))
def test_endings_are_found_as_by_looking_everywhere(ids: list[int], first: int) -> None:
    lookup = PromptLookup()
    lookup.propose([("a", ids[:first])], {"a": 1})
    found = lookup.propose([("a", ids)], {"a": 1}).get("a", ())
    expected: tuple[int, ...] = ()
    for size in (4, 3, 2):
        ends = [e for e in range(size, len(ids)) if ids[e - size : e] == ids[len(ids) - size :]]
        if len(ids) >= size and ends:
            expected = (ids[ends[-1]],)
            break
    assert found == expected


class Stubborn:
    """Guesses one token again and again, for a while."""

    def __init__(self, token: int, times: int) -> None:
        self._token, self._times = token, times

    def propose(
        self, sequences: Iterable[tuple[str, Sequence[int]]], room: Mapping[str, int]
    ) -> dict[str, tuple[int, ...]]:
        self._times -= 1
        return {name: (self._token,) * 2 for name, _ in sequences if self._times > 0}

    def observe(self, request_id: str, drafted: int, accepted: int) -> None:
        assert accepted == 0

    def forget(self, request_id: str) -> None:
        pass


def test_a_guess_that_spoils_the_step_is_dropped_and_not_the_request() -> None:
    def spoil(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, torch.nan) if 271 in ids else logits

    asked = request("a", "prompt", max_tokens=30, ignore_eos=True)
    served = with_drafter(Stubborn(271, 9), model=Wrapped(spoil))
    events = run(served, asked)["a"]
    assert tokens(events) == tokens(run(engine(), asked)["a"])
    assert served.status().drafted_tokens == 0
    assert served.status().computed_tokens > 30 + 6 + 8


def test_an_unknown_way_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="prompt-lookup"):
        EngineSettings(speculation="prompt-lookups")


def test_a_request_that_ends_within_its_guesses_says_no_more() -> None:
    first = request("a", list(b"abcdefgh" * 4), max_tokens=60, ignore_eos=True)
    said = tokens(run(engine(), first)["a"])
    prompt = [*b"abcdefgh" * 4, *said[:30]]
    events = run(
        engine(speculation="prompt-lookup"),
        request("b", prompt, max_tokens=30, stop_token_ids=(said[37],), ignore_eos=True),
    )["b"]
    stop = said[30:].index(said[37]) + 1
    assert tokens(events) == said[30 : 30 + stop]
    assert isinstance(events[-1], FinishEvent)
    assert finish(events).matched_stop == said[37]
