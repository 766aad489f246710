"""One row to one token: against a readable reference, by chi-square, and at the edges."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.engine.sampler import candidates
from qwenkit.types.sampling import SamplingParams
from samplers import VOCAB, after, listed, normal, reference, sampler

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 6, "top_p": 0.8, "min_p": 0.1, "temperature": 0.8},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.8, "frequency_penalty": 0.4},
    {"repetition_penalty": 1.1, "presence_penalty": -0.5, "temperature": 0.7, "top_p": 0.9},
    {"logit_bias": {2: 1.5, 7: -1.0, 9: 3.0}},
    {"logit_bias": {0: -100, 3: -100}, "temperature": 1.5},
    {
        "logit_bias": {1: 2.0, 4: -0.5},
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "temperature": 0.6,
        "top_k": 7,
        "min_p": 0.02,
    },
)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_samples_have_the_distribution_of_the_rules(options: dict[str, Any]) -> None:
    """Chi-square over 4,000 seeds for the fourth output token, at 1 in 10,000 of false alarm."""
    logits = torch.randn(10, generator=torch.Generator().manual_seed(3)) * 1.5
    prompt, output = (2, 5), (1, 1, 7)
    expected = reference(logits.tolist(), prompt, output, SamplingParams.from_mapping(options))
    counts: Counter[int] = Counter()
    for seed in range(4000):
        chooser = after(sampler(prompt=prompt, seed=seed, **options), output)
        counts[chooser.choose(logits).token_id] += 1
    assert set(counts) <= set(expected)
    chi_square = sum((counts[t] - 4000 * p) ** 2 / (4000 * p) for t, p in expected.items())
    # Wilson and Hilferty's approximation of the quantile at 3.72 standard deviations
    degrees = max(sum(p > 1e-9 for p in expected.values()) - 1, 1)
    bound = degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi_square < bound


@settings(deadline=None, max_examples=200, derandomize=True, database=None)
@given(
    eighths=st.lists(st.integers(-200, 200), min_size=2, max_size=40),
    top_k=st.integers(0, 50),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    temperature=st.floats(0.05, 5),
)
def test_candidates_are_those_of_the_rules(
    eighths: list[int], top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = [number / 8 for number in eighths]
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    ids, weights = candidates(numpy.array(logits, numpy.float32), params)
    found = dict(zip(listed(ids, len(logits)), (weights / weights.sum()).tolist(), strict=True))
    assert max(weights.tolist()) == 1
    # A bound may fall on a weight to within rounding: then either set is right.
    strict, loose = (
        reference(
            logits,
            (),
            (),
            params.replace(
                top_p=min(max(top_p + sign * 1e-6, 0.0), 1.0),
                min_p=min(min_p * (1 - sign * 1e-5), 1.0),
            ),
        )
        for sign in (-1, 1)
    )
    assert len(strict) <= len(found) <= len(loose)
    if len(strict) == len(loose) and len(set(logits)) == len(logits):
        assert found == pytest.approx(loose, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("top_p", [0.0, 0.5, 0.95, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 8.0])
@pytest.mark.parametrize("size", [1, 700, 5000])
def test_the_nucleus_is_that_of_a_full_sort(top_p: float, scale: float, size: int) -> None:
    ids, weights = candidates(normal(size, seed=1) * scale, SamplingParams(top_p=top_p))
    everything = numpy.exp(normal(size, seed=1) * scale, dtype=numpy.float64)
    order = numpy.argsort(-everything, kind="stable")
    sums = everything[order].cumsum() / everything.sum()
    count = 1 + int((sums[:-1] < top_p).sum())  # one is kept of nothing
    assert ids is not None
    assert abs(len(ids) - count) <= (1 if 0 < top_p < 0.9999 or scale == 0 else count // 100)
    assert weights[0] == 1
    assert (numpy.diff(weights) <= 0).all()
    assert set(ids[: count - 1].tolist()) <= set(order[: count + 1].tolist())


def test_equal_weights_of_a_nucleus_come_in_their_own_order() -> None:
    scores = numpy.array([1, 2, 1, 2, 1, 2, -9], numpy.float32)
    ids, _ = candidates(scores, SamplingParams(top_p=0.99))
    assert listed(ids, 7) == [1, 3, 5, 0, 2, 4]


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 63, 64, 65, 255, 256, 257, 319])
@pytest.mark.parametrize("size", [64, 65, 127, 128, 256, 257, 319, 320])
@pytest.mark.parametrize("levels", [1, 2, 40, 1 << 20])
def test_top_k_keeps_what_a_full_sort_keeps(top_k: int, size: int, levels: int) -> None:
    """Fewer, as many and more than the columns that are looked at first (1 to 5 of them), with and
    without a remainder, and with many equal scores at the bound.
    """
    scores = numpy.random.default_rng(size).integers(0, levels, size).astype(numpy.float32)
    scores *= numpy.float32(1e-6)
    for row in (scores, numpy.sort(scores), numpy.sort(scores)[::-1].copy()):
        ids, weights = candidates(row, SamplingParams(top_k=top_k))
        bound = numpy.sort(row)[::-1][: min(top_k, size)][-1]
        assert listed(ids, size) == numpy.flatnonzero(row >= bound).tolist()
        numpy.testing.assert_array_equal(weights, numpy.exp(row - row.max())[listed(ids, size)])


def test_scores_that_temperature_makes_equal_are_equal_at_the_bound_of_top_k() -> None:
    scores = numpy.full(200, -1.0, numpy.float32)
    scores[[5, 150]] = 3.0
    scores[[17, 90]] = [1e-7, 0.0]  # 3.0 apart from the best in fp32, both of them
    ids, _ = candidates(scores, SamplingParams(top_k=3))
    assert listed(ids, 200) == [5, 17, 90, 150]


@pytest.mark.parametrize("size", [VOCAB, VOCAB - 293])
def test_equal_logits_of_a_whole_vocabulary(size: int) -> None:
    scores = numpy.full(size, 7.25, numpy.float32)
    assert listed(candidates(scores, SamplingParams(top_k=20))[0], size) == list(range(size))
    ids, weights = candidates(scores, SamplingParams(top_k=20, top_p=0.75))
    assert listed(ids, size) == list(range(math.ceil(0.75 * size)))
    assert (weights == 1).all()
    whole: tuple[dict[str, Any], ...] = ({}, {"top_k": 20, "top_p": 0.8}, {"min_p": 1.0})
    chosen = {
        sampler(seed=seed, vocab_size=size, **options).choose(torch.from_numpy(scores)).token_id
        for seed in range(8)
        for options in whole
    }
    assert min(chosen) < size / 4 < size / 2 < max(chosen) < size
    best = sampler(vocab_size=size, temperature=0, logprobs=2).choose(torch.from_numpy(scores))
    assert best.top_logprobs == ((0, best.logprob), (1, best.logprob))
    assert best.logprob == pytest.approx(-math.log(size), abs=1e-9)


@pytest.mark.parametrize("scale", [0.5, 4.0])
@pytest.mark.parametrize(
    "options", [{"top_k": 20}, {"top_p": 0.8}, {"top_k": 3000, "top_p": 0.9, "min_p": 0.01}]
)
def test_a_whole_vocabulary_is_filtered_as_by_a_full_sort(
    scale: float, options: dict[str, Any]
) -> None:
    scores = normal(VOCAB - 293, seed=5) * scale
    params = SamplingParams.from_mapping(options)
    ids, weights = candidates(scores, params)
    order = numpy.argsort(-scores, kind="stable")[: params.top_k or None]
    wide = numpy.exp((scores[order] - scores.max()).astype(numpy.float64))
    before = wide.cumsum() - wide
    kept = order[(before < params.top_p * wide.sum()) & (wide >= params.min_p)]
    found = listed(ids, len(scores))
    assert abs(len(found) - len(kept)) <= 1
    assert len(set(found) ^ set(kept.tolist())) <= 1
    numpy.testing.assert_allclose(weights, numpy.exp(scores[ids] - scores.max()), rtol=1e-6)
