"""Several answers to one prompt: each as its seed gives alone, the best of more first."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from qwenkit import LLM, AsyncLLM
from qwenkit.api.choices import Choices
from qwenkit.errors import RequestError
from qwenkit.types.completion import Completion, Timing
from qwenkit.types.events import FinishReason, TokenLogprob, Usage
from qwenkit.types.sampling import SamplingParams
from tiny import write_tiny_checkpoint

SAMPLING: dict[str, Any] = {"temperature": 1.0, "max_tokens": 9, "ignore_eos": True, "seed": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder) as llm:
        yield llm


def said(done: Completion) -> tuple[Any, ...]:
    """All of a completion but its times."""
    return (done.seed, done.token_ids, done.text, done.finish_reason, done.usage, done.logprobs)


def test_choices_come_in_the_order_of_their_seeds_and_as_alone(llm: LLM) -> None:
    choices = llm.choices("abc", SAMPLING, n=4)
    alone = [llm.generate("abc", SAMPLING | {"seed": 40 + i}) for i in range(4)]
    assert [said(one) for one in choices] == [said(one) for one in alone]
    assert len({one.token_ids for one in choices}) == 4
    assert llm.choices([97, 98, 99], SAMPLING, n=1)[0].token_ids == choices[0].token_ids


@pytest.mark.parametrize("logprobs", [None, 2])
def test_the_best_of_more_come_first_and_say_what_was_asked(llm: LLM, logprobs: int | None) -> None:
    asked = SAMPLING | {"logprobs": logprobs}
    alone = {}
    for seed in range(40, 47):
        done = llm.generate("abc", asked | {"seed": seed, "logprobs": 2})
        assert done.logprobs is not None
        alone[seed] = fmean(token.logprob for token in done.logprobs)
    best = sorted(alone, key=lambda seed: -alone[seed])[:3]
    choices = llm.choices("abc", asked, n=3, best_of=7)
    assert [one.seed for one in choices] == best
    expected = [llm.generate("abc", asked | {"seed": seed}) for seed in best]
    assert [said(one) for one in choices] == [said(one) for one in expected]


def test_a_drawn_seed_is_told_and_repeats_the_choices(llm: LLM) -> None:
    without = {name: value for name, value in SAMPLING.items() if name != "seed"}
    first = llm.choices("abc", without, n=3)
    again = llm.choices("abc", without | {"seed": first[0].seed}, n=3)
    assert [said(one) for one in again] == [said(one) for one in first]


def test_seeds_after_the_largest_begin_anew() -> None:
    choices = Choices(SamplingParams(seed=2**63 - 1), 3)
    assert [one.seed for one in choices.candidates()] == [2**63 - 1, 0, 1]


def completion(reason: FinishReason, *logprobs: float) -> Completion:
    entries = tuple(TokenLogprob(i, p, ()) for i, p in enumerate(logprobs))
    ids = tuple(range(len(logprobs)))
    timing = Timing(1, len(ids), 0.0, 0.0)
    return Completion((1,), ids, "", reason, Usage(1, len(ids)), 0, timing, logprobs=entries)


def test_the_mean_decides_and_a_failed_answer_comes_last() -> None:
    done = [
        completion("error", -0.1),
        completion("stop"),
        completion("length", -1.0, -1.0, -1.0),
        completion("stop", -2.0),
        completion("loop", -0.5, -0.7),
    ]
    choices = Choices(SamplingParams(seed=0, logprobs=0), 5, 5)
    assert choices.chosen(done) == [done[4], done[2], done[3], done[0], done[1]]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": None}, "n"),
        ({"n": True}, "n"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"n": 2, "best_of": 129}, "best_of"),
        ({"n": 2, "best_of": "3"}, "best_of"),
    ],
)
def test_how_many_is_checked_by_name(llm: LLM, given: Any, field: str) -> None:
    with pytest.raises(RequestError) as error:
        llm.choices("abc", SAMPLING, **given)
    assert error.value.field == field


def test_asyncio_gives_the_same_choices(folder: Path, llm: LLM) -> None:
    async def run() -> list[Completion]:
        async with AsyncLLM(folder) as model:
            return await model.choices("abc", SAMPLING, n=2, best_of=5)

    expected = llm.choices("abc", SAMPLING, n=2, best_of=5)
    assert [said(one) for one in asyncio.run(run())] == [said(one) for one in expected]
