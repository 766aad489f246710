"""Beam search against the search for all continuations, and on a model through the engine."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import ByteTokenizer
from qwenkit import LLM, AsyncLLM
from qwenkit.api.beam import BeamSearch, BeamSettings, likeliest
from qwenkit.errors import QwenkitError, RequestError
from qwenkit.types.completion import BeamCompletion
from tiny import IM_END, write_tiny_checkpoint

Table = dict[tuple[int, ...], list[float]]
STOP = 0


def searched(table: Table, given: BeamSettings, *, stops: Sequence[int] = (STOP,)) -> Any:
    """The answers of a search on a "model" that is a table: prefix → log-probabilities."""
    size = len(next(iter(table.values())))
    search = BeamSearch(given, stop_ids={i: i for i in stops}, most=size)
    while search.open:
        rows = [sorted(enumerate(table[ids]), key=lambda p: -p[1]) for ids in search.open]
        search.advance([row[: search.alternatives] for row in rows])
    return search.results(ByteTokenizer())


def all_answers(table: Table, given: BeamSettings) -> list[tuple[tuple[int, ...], float]]:
    """Every continuation there is, with its score, the best first."""
    size = len(next(iter(table.values())))
    found = []
    for length in range(1, given.max_tokens + 1):
        for ids in itertools.product(range(size), repeat=length):
            ended = STOP in ids[:-1]
            if ended or (length < given.max_tokens and ids[-1] != STOP):
                continue
            logprob = math.fsum(table[ids[:n]][ids[n]] for n in range(length))
            found.append((ids, logprob / length**given.length_penalty))
    return sorted(found, key=lambda pair: -pair[1])


@st.composite
def tables(draw: st.DrawFn, size: int = 3, depth: int = 4) -> Table:
    prefixes = [p for n in range(depth) for p in itertools.product(range(size), repeat=n)]
    generator = random.Random(draw(st.integers(0, 10**6)))
    table = {}
    for prefix in prefixes:
        weights = [math.exp(generator.gauss(0, 2)) for _ in range(size)]
        table[prefix] = [math.log(weight / sum(weights)) for weight in weights]
    return table


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(table=tables(), penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.0]))
def test_a_beam_as_wide_as_all_there_is_finds_the_best_answers(
    table: Table, penalty: float
) -> None:
    given = BeamSettings(width=81, max_tokens=4, length_penalty=penalty)
    found = searched(table, given)
    expected = all_answers(table, given)
    assert [beam.token_ids for beam in found] == [ids for ids, _ in expected]
    assert [beam.score for beam in found] == pytest.approx([score for _, score in expected])


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(
    table=tables(),
    width=st.integers(1, 4),
    penalty=st.sampled_from([0.0, 1.0]),
    early=st.booleans(),
)
def test_a_narrow_beam_tells_the_truth_of_what_it_finds(
    table: Table, width: int, penalty: float, early: bool
) -> None:
    given = BeamSettings(width=width, max_tokens=4, length_penalty=penalty, early_stopping=early)
    found: list[BeamCompletion] = searched(table, given)
    scores = dict(all_answers(table, given))
    assert 1 <= len(found) <= width
    assert len({beam.token_ids for beam in found}) == len(found)
    assert [beam.score for beam in found] == sorted((beam.score for beam in found), reverse=True)
    for beam in found:
        assert beam.score == pytest.approx(scores[beam.token_ids])
        length = len(beam.token_ids)
        assert beam.cumulative_logprob == pytest.approx(beam.score * length**penalty)
        stopped = beam.token_ids[-1] == STOP
        assert beam.finish_reason == ("stop" if stopped else "length")
        assert beam.matched_stop == (STOP if stopped else None)


def test_early_stopping_takes_the_first_answers_and_the_penalty_weighs_lengths() -> None:
    log = math.log
    table: Table = {
        (): [log(0.4), log(0.35), log(0.25)],
        (1,): [log(0.3), log(0.69), log(0.01)],
        (2,): [log(0.9), log(0.05), log(0.05)],
        (1, 1): [log(0.99), log(0.005), log(0.005)],
        (1, 2): [log(0.99), log(0.005), log(0.005)],
        (2, 1): [log(0.99), log(0.005), log(0.005)],
        (2, 2): [log(0.99), log(0.005), log(0.005)],
    }
    early = searched(table, BeamSettings(width=2, max_tokens=3, early_stopping=True))
    assert [beam.token_ids for beam in early] == [(STOP,), (2, STOP)][::-1]
    late = searched(table, BeamSettings(width=2, max_tokens=3))
    assert [beam.token_ids for beam in late] == [(1, 1, STOP), (2, STOP)]
    short = searched(table, BeamSettings(width=2, max_tokens=3, length_penalty=0.0))
    assert [beam.token_ids for beam in short] == [(STOP,), (1, 1, STOP)]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"width": 0}, "width"),
        ({"width": 129}, "width"),
        ({"width": True}, "width"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"length_penalty": math.nan}, "length_penalty"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"early_stopping": "never"}, "early_stopping"),
        ({"stop_token_ids": (480,)}, "stop_token_ids"),
        ({"prompt": ""}, "prompt_ids"),
        ({"prompt": "x" * 512}, "prompt_ids"),
        ({"options": {"prio": 1}}, "prio"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(llm: LLM, given: Any, field: str) -> None:
    with pytest.raises(RequestError) as error:
        llm.beam_search(**{"prompt": "abc", "width": 2, "max_tokens": 4} | given)
    assert error.value.field == field


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder) as llm:
        yield llm


def test_one_beam_is_greedy(llm: LLM) -> None:
    (beam,) = llm.beam_search("abc", width=1, max_tokens=12, ignore_eos=True)
    greedy = llm.generate(
        "abc", {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 0}
    )
    assert (beam.token_ids, beam.text) == (greedy.token_ids, greedy.text)
    assert beam.cumulative_logprob == pytest.approx(greedy.cumulative_logprob)


def test_answers_have_their_text_without_the_stop(llm: LLM) -> None:
    plain = llm.beam_search("abc", width=4, max_tokens=5, ignore_eos=True)
    stop = plain[0].token_ids[0]
    beams = llm.beam_search(
        "abc", width=4, max_tokens=5, length_penalty=0.0, stop_token_ids=(stop, IM_END)
    )
    assert any(beam.matched_stop == stop for beam in beams)
    for beam in beams:
        kept = beam.token_ids[:-1] if beam.finish_reason == "stop" else beam.token_ids
        assert beam.text == llm.tokenizer.decode(list(kept), skip_special=True)
        assert all(token < 464 for token in beam.token_ids), "padded rows are no tokens"
        logprobs = llm.generate([[97, 98, 99]], {"temperature": 0, "max_tokens": 1, "logprobs": 99})
        assert logprobs[0].logprobs is not None
        assert beam.token_ids[0] in dict(logprobs[0].logprobs[0].top)


def test_the_context_bounds_the_answers(llm: LLM) -> None:
    beams = llm.beam_search("x" * 509, width=2, max_tokens=50, ignore_eos=True)
    assert [len(beam.token_ids) for beam in beams] == [3, 3]


def test_asyncio_finds_the_same_answers(folder: Path, llm: LLM) -> None:
    async def run() -> list[BeamCompletion]:
        async with AsyncLLM(folder) as model:
            return await model.beam_search("abc", width=3, max_tokens=6)

    assert asyncio.run(run()) == llm.beam_search("abc", width=3, max_tokens=6)


def test_a_step_that_fails_ends_the_search_with_its_error(llm: LLM) -> None:
    done = llm.generate("abc", {"max_tokens": 1, "seed": 0})
    with pytest.raises(QwenkitError, match=r"the beam search ended early: \w+\."):
        likeliest(done)
