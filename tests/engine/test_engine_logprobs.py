"""Log-probabilities of given tokens by rows of logits: plain arithmetic, and the edges."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.engine.collector import Collector
from qwenkit.engine.logprobs import prompt_logprobs, token_logprob
from qwenkit.engine.request import Request
from qwenkit.errors import NonFiniteError
from qwenkit.types.events import FinishEvent, PromptEvent, TokenEvent, TokenLogprob, Usage
from qwenkit.types.sampling import SamplingParams


def logits(rows: int, *, vocab_rows: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_rows, generator=torch.Generator().manual_seed(seed)) * 3


@given(
    row=st.lists(st.integers(-40, 40), min_size=3, max_size=30),
    pick=st.integers(0, 100),
    count=st.integers(0, 40),
    padding=st.integers(0, 2),
)
def test_a_rows_numbers_are_those_of_plain_arithmetic(
    row: list[int], pick: int, count: int, padding: int
) -> None:
    """Quarters, so that many are equal: of these the lower id comes first."""
    scores = [number / 4 for number in row]
    vocab_size = len(row) - padding
    total = math.log(math.fsum(map(math.exp, scores)))  # padded rows have their share
    best = sorted(range(vocab_size), key=lambda i: (-scores[i], i))[:count]
    found = token_logprob(
        numpy.array(scores, numpy.float32), pick % vocab_size, count=count, vocab_size=vocab_size
    )
    assert found.token_id == pick % vocab_size
    assert found.logprob == pytest.approx(scores[found.token_id] - total, abs=1e-6)
    assert [token_id for token_id, _ in found.top] == best
    assert [p for _, p in found.top] == pytest.approx([scores[i] - total for i in best], abs=1e-6)


def test_each_row_speaks_of_the_token_after_it_and_of_nothing_else() -> None:
    rows, ids = logits(5), [3, 0, 9, 9, 1]
    together = prompt_logprobs(rows, ids, count=2, vocab_size=10)
    assert [entry.token_id for entry in together] == ids
    for row, token_id, entry in zip(rows, ids, together, strict=True):
        assert prompt_logprobs(row[None], [token_id], count=2, vocab_size=10) == (entry,)
        assert entry.logprob == pytest.approx(row.log_softmax(0)[token_id].item(), abs=1e-6)
    assert prompt_logprobs(rows[3:], ids[3:], count=2, vocab_size=10, start=4) == together[3:]
    assert prompt_logprobs(rows[:0], [], count=2, vocab_size=10) == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rows_of_other_dtypes_are_read_in_fp32(dtype: torch.dtype) -> None:
    rows = logits(3).to(dtype)
    wide = prompt_logprobs(rows.float(), [1, 2, 3], count=3, vocab_size=10)
    assert prompt_logprobs(rows, [1, 2, 3], count=3, vocab_size=10) == wide
    before = rows.clone()
    prompt_logprobs(rows, [1, 2, 3], count=3, vocab_size=10)
    assert torch.equal(rows, before)


def test_padded_rows_are_never_reported_however_likely() -> None:
    rows = logits(2)
    rows[:, 10:] = 90.0
    for entry in prompt_logprobs(rows, [4, 5], count=12, vocab_size=10):
        assert {token_id for token_id, _ in entry.top} == set(range(10))
        assert entry.logprob < -60


def test_numbers_that_are_far_apart_stay_finite_or_become_nothing() -> None:
    row = numpy.array([3e38, -3e38, 0.0], numpy.float32)
    found = token_logprob(row, 0, count=3, vocab_size=3)
    assert found.logprob == 0.0
    assert found.top == ((0, 0.0), (2, float(-row[0])), (1, float(row[1]) - float(row[0])))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_named_by_its_place(bad: float) -> None:
    rows = logits(3)
    rows[1, 11] = bad
    with pytest.raises(NonFiniteError, match=r"1 of the model's 12 logits for token 8 of the prom"):
        prompt_logprobs(rows, [1, 2, 3], count=0, vocab_size=10, start=7)


def test_rows_and_tokens_are_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        prompt_logprobs(logits(2), [1], count=0, vocab_size=10)


def test_a_completion_has_what_was_said_of_its_prompt() -> None:
    entries = tuple(TokenLogprob(i, -float(i), ()) for i in (5, 6, 7))
    said = (PromptEvent("r", 0, (None, entries[0])), PromptEvent("r", 2, entries[1:]))
    token = TokenEvent("r", 9, "x", -0.5, ((9, -0.5),))
    finish = FinishEvent("r", "length", "", Usage(4, 2))

    def collected(**sampling: int) -> Collector:
        params = SamplingParams(seed=1, **sampling)  # type: ignore[arg-type]
        return Collector(Request("r", (4, 5, 6, 7), params))

    collector = collected(prompt_logprobs=0, logprobs=1)
    for event in (*said, token, token, finish):
        collector.add(event)
    done = collector.completion()
    assert done.prompt_logprobs == (None, *entries)
    assert done.token_ids == (9, 9)
    assert done.cumulative_logprob == -1.0
    collector = collected()
    for event in (token, finish):
        collector.add(event)
    assert collector.completion().prompt_logprobs is None
    assert collector.completion().cumulative_logprob is None
