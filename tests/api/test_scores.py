"""Scores of continuations: those of a plain forward pass, with shared contexts computed once."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit import LLM, AsyncLLM
from qwenkit.api.scores import split_pair
from qwenkit.errors import RequestError
from qwenkit.layers.attention import PackedCausal
from qwenkit.score import Score, score
from tiny import IM_END, write_tiny_checkpoint

HEADER = list(range(40, 140))
PAIRS: list[tuple[Any, Any]] = [
    (HEADER, [1, 2, 3]),
    (HEADER, [1, 9]),
    ([5], [6]),
    ("The capital of France is ", "Paris."),
    ("", "a"),
    ([*HEADER, 7], [250] * 200),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("m"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder) as opened:
        yield opened


def expected(llm: LLM, pair: tuple[Any, Any]) -> Score:
    """By one pass over the whole of it."""
    first = llm.record.eos_token_id
    ids, length = split_pair(*pair, llm.tokenizer, first)
    tokens = torch.tensor(ids)
    with torch.inference_mode():
        logits = llm.model(tokens, PackedCausal(torch.tensor([len(ids)])))
    return score(logits[length - 1 : -1], tokens[length:])


def test_scores_are_those_of_a_plain_forward_pass(llm: LLM) -> None:
    found = llm.score(PAIRS)
    assert [one.tokens for one in found] == [expected(llm, pair).tokens for pair in PAIRS]
    for ours, pair in zip(found, PAIRS, strict=True):
        theirs = expected(llm, pair)
        assert ours.is_greedy == theirs.is_greedy
        assert ours.token_logprobs == pytest.approx(theirs.token_logprobs, abs=2e-4)
        assert ours.logprob_sum == pytest.approx(math.fsum(ours.token_logprobs), abs=1e-9)


def test_a_shared_context_is_computed_once_and_changes_no_bit(folder: Path) -> None:
    pairs = [(HEADER, [i, i + 1]) for i in range(20)]
    with LLM(folder) as llm, LLM(folder, prefix_cache=False) as plain:
        together, apart = llm.score(pairs), [plain.score([pair])[0] for pair in pairs]
        computed = llm._service.engine.status().computed_tokens
        assert computed < len(HEADER) + 20 * 16
        assert together == apart


def test_a_greedy_continuation_is_known_as_such(llm: LLM) -> None:
    said = llm.generate([[1, 2, 3]], {"temperature": 0, "max_tokens": 5, "ignore_eos": True})[0]
    good, bad = llm.score([([1, 2, 3], said.token_ids), ([1, 2, 3], [*said.token_ids[:4], 0])])
    assert good.is_greedy
    assert not bad.is_greedy


def test_scores_come_to_coroutines_too(folder: Path, llm: LLM) -> None:
    async def ask() -> list[Score]:
        async with AsyncLLM(folder) as served:
            return await served.score(PAIRS[:3])

    for ours, theirs in zip(asyncio.run(ask()), llm.score(PAIRS[:3]), strict=True):
        assert ours.token_logprobs == pytest.approx(theirs.token_logprobs, abs=1e-5)


def test_spaces_between_two_texts_belong_to_the_second(llm: LLM) -> None:
    ids, length = split_pair("a  ", "b", llm.tokenizer, IM_END)
    assert (ids, length) == (list(b"a  b"), 1)
    assert split_pair("", " b", llm.tokenizer, IM_END) == ([IM_END, *b" b"], 1)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (("a", ""), "nothing to score"),
        (([1], []), "nothing to score"),
        (("a", [1]), "two texts or two lists"),
        (([1], [2.5]), "whole numbers"),
        (([1], [9999]), "outside the vocabulary"),
        (([1], [2] * 600), "tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_refused_by_name(
    llm: LLM, pair: tuple[Any, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        llm.score([pair])


@pytest.mark.parametrize(
    "pairs", [None, "ab", {"a": "b"}, [5], ["ab"], [("a",)], [("a", "b", "c")]]
)
def test_what_is_no_list_of_pairs_is_refused_by_name(llm: LLM, pairs: Any) -> None:
    with pytest.raises(RequestError, match="pairs: expected a list of pairs"):
        llm.score(pairs)


def test_no_pairs_have_no_scores(llm: LLM) -> None:
    assert llm.score([]) == []


def test_the_prompts_own_log_probabilities_come_with_the_answer(llm: LLM) -> None:
    prompt = [*HEADER, 3, 4]
    done = llm.generate([prompt], {"prompt_logprobs": 2, "max_tokens": 2, "seed": 0})[0]
    assert done.prompt_logprobs is not None
    assert done.prompt_logprobs[0] is None
    rest = [one for one in done.prompt_logprobs if one is not None]
    assert [one.token_id for one in rest] == prompt[1:]
    assert [len(one.top) for one in rest] == [2] * (len(prompt) - 1)
    whole = llm.score([(prompt[:1], prompt[1:])])[0]
    assert tuple(one.logprob for one in rest) == whole.token_logprobs
    assert len(done.token_ids) == 2
