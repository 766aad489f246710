"""One row to one token: against a readable reference, by chi-square, and at the edges."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from qwenkit.engine.sampler import Choice, Sampler, candidates, draw, uniform
from qwenkit.errors import NonFiniteError
from qwenkit.types.sampling import SamplingParams

VOCAB = 151_936  # Qwen2's rows
PINNED = [0.0870176532990985, 0.7930227924837461, 0.5203931175836789]  # of seed 1234


def sampler(
    *,
    prompt: Sequence[int] = (),
    vocab_size: int = 10,
    stops: Sequence[int] = (),
    **options: Any,
) -> Sampler:
    params = SamplingParams.from_mapping(options)
    return Sampler(
        params,
        prompt_ids=prompt,
        seed=params.seed or 0,
        vocab_size=vocab_size,
        stop_ids=stops,
    )


def normal(size: int, *, seed: int) -> NDArray[numpy.float32]:
    return numpy.random.default_rng(seed).standard_normal(size, numpy.float32)


def after(chooser: Sampler, output: Sequence[int]) -> Sampler:
    """A sampler that has sampled `output` before."""
    for token in output:
        chooser._remember(token)
    return chooser


def adjusted(chooser: Sampler, row: torch.Tensor) -> Any:
    """What penalties and biases make of a row of logits."""
    scores = row.numpy().copy()
    chooser._adjust(scores)
    return scores


def listed(ids: NDArray[numpy.int64] | None, size: int) -> list[int]:
    return list(range(size)) if ids is None else ids.tolist()


def reference(
    logits: Sequence[float], prompt: Sequence[int], output: Sequence[int], params: SamplingParams
) -> dict[int, float]:
    """The probabilities of what may be sampled, one rule after the other, in plain Python."""
    scores = dict(enumerate(logits))
    for token in {*prompt, *output}:
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token, count in Counter(output).items():
        scores[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias:
        scores[token] += bias
    scores = {token: score / params.temperature for token, score in scores.items()}
    if params.top_k:
        bound = sorted(scores.values(), reverse=True)[: params.top_k][-1]
        scores = {token: score for token, score in scores.items() if score >= bound}
    best = max(scores.values())
    weights = {token: math.exp(score - best) for token, score in scores.items()}
    total, before = sum(weights.values()), 0.0
    kept: dict[int, float] = {}
    for token in sorted(weights, key=lambda t: -weights[t]):
        if params.top_p == 1 or before < params.top_p * total or not kept:
            kept[token] = weights[token]
        before += weights[token]
    kept = {token: weight for token, weight in kept.items() if weight >= params.min_p}
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


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


@settings(deadline=None, max_examples=300, derandomize=True, database=None)
@given(
    eighths=st.lists(st.integers(-80, 80), min_size=10, max_size=10),
    prompt=st.lists(st.integers(0, 9), max_size=5),
    output=st.lists(st.integers(0, 9), max_size=8),
    biases=st.dictionaries(st.integers(0, 9), st.integers(-32, 32).map(lambda n: n / 8)),
    options=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.25, 0.5, 1.0, 2.0]),
            "top_k": st.integers(0, 11),
            "top_p": st.floats(0, 1),
            "min_p": st.floats(0, 1),
            "repetition_penalty": st.sampled_from([0.5, 1.0, 2.0]),
            "presence_penalty": st.integers(-16, 16).map(lambda n: n / 8),
            "frequency_penalty": st.integers(-16, 16).map(lambda n: n / 8),
            "seed": st.integers(0, 2**63 - 1),
        }
    ),
)
def test_a_sampler_chooses_from_what_the_rules_leave(
    eighths: list[int],
    prompt: list[int],
    output: list[int],
    biases: dict[int, float],
    options: dict[str, Any],
) -> None:
    """All rules together, in numbers that fp32 holds exactly until the weights are made of them; a
    token may be in or out where its weight or those before it are within rounding of a bound.
    """
    given = options | {"logit_bias": biases}
    params = SamplingParams.from_mapping(given)
    logits = [number / 8 for number in eighths]
    near = {  # as the rules have it with every bound a little lower, and a little higher
        share: reference(
            logits,
            prompt,
            output,
            params.replace(
                top_p=min(params.top_p * share, 1.0), min_p=min(params.min_p / share, 1.0)
            ),
        )
        for share in (1 + 1e-5, 1 - 1e-5)
    }
    row = torch.tensor([*logits, 1e30, 1e30])  # two padded rows, the most likely by far
    token = after(sampler(prompt=prompt, **given), output).choose(row).token_id
    assert token in near[1 + 1e-5]
    ids, weights = candidates(
        adjusted(after(sampler(prompt=prompt, **given), output), row[:10]), params
    )
    found = {i for i, weight in zip(listed(ids, 10), weights, strict=True) if weight > 0}
    likely = {i for i, p in near[1 - 1e-5].items() if p > 1e-30}
    assert likely <= found <= set(near[1 + 1e-5])


def test_a_bias_comes_after_the_penalties_and_before_the_temperature() -> None:
    logits = torch.tensor([4.0, 1.0, -1.0])
    options: dict[str, Any] = {"repetition_penalty": 2.0, "logit_bias": {0: -2.5}, "logprobs": 1}
    chooser = sampler(vocab_size=3, prompt=[0], **options)
    assert adjusted(chooser, logits).tolist() == [-0.5, 1.0, -1.0]  # 4 / 2 - 2.5
    ids, weights = candidates(adjusted(chooser, logits), SamplingParams(temperature=0.5, **options))
    assert ids is None
    assert weights.tolist() == pytest.approx([math.exp(-1.5 / 0.5), 1.0, math.exp(-2 / 0.5)])
    choice = sampler(vocab_size=3, temperature=0, **options).choose(logits)
    raw = logits.log_softmax(0)  # what is reported knows no bias
    assert (choice.token_id, choice.logprob) == (0, pytest.approx(raw[0].item()))
    assert sampler(vocab_size=3, temperature=0, logit_bias={2: 100}).choose(logits) == Choice(2)
    banned = {"logit_bias": {0: -100, 1: -100}}
    assert {
        sampler(vocab_size=3, seed=s, **banned).choose(logits).token_id for s in range(200)
    } == {2}


def test_neighbours_at_the_extremes_change_nothing() -> None:
    """Samplers that take turns over the same rows; each chooses as it does alone."""
    rows = torch.randn(30, 12, generator=torch.Generator().manual_seed(4))
    given: list[dict[str, Any]] = [
        {"seed": 1},
        {"seed": 2, "logit_bias": {i: (-1) ** i * 100 for i in range(10)}, "temperature": 1e-300},
        {"seed": 1, "top_p": 0.9, "presence_penalty": 0.5, "logprobs": 3},
        {"seed": 3, "repetition_penalty": 1e-300, "frequency_penalty": -100, "top_k": 2**62},
        {"seed": 1, "logit_bias": {3: 0.5}, "min_p": 0.1},
        {"seed": 4, "min_tokens": 20, "stops": range(9), "presence_penalty": 100},
    ]
    alone = []
    for options in given:
        chooser = sampler(**options)
        alone.append([chooser.choose(row) for row in rows])
    together = [sampler(**options) for options in given]
    for number, row in enumerate(rows):
        for chooser, expected in zip(together, alone, strict=True):
            if number == 7:
                with pytest.raises(NonFiniteError):
                    chooser.choose(row * math.nan)
            assert chooser.choose(row) == expected[number]


def test_greedy_takes_the_most_likely_after_the_penalties() -> None:
    logits = torch.tensor([0.0, 3.0, 2.9, -1.0])
    for options in ({"temperature": 0}, {"top_k": 1, "temperature": 3.0}):
        assert sampler(vocab_size=4, **options).choose(logits) == Choice(1)
    assert sampler(vocab_size=4, temperature=0, repetition_penalty=1.2, prompt=[1]).choose(
        logits
    ) == Choice(2)
    chooser = sampler(vocab_size=4, temperature=0, presence_penalty=0.2)
    assert [chooser.choose(logits).token_id for _ in range(3)] == [1, 2, 1]


def test_repetition_covers_prompt_and_output_and_the_others_the_output_only() -> None:
    logits = torch.tensor([2.0, 1.9, 1.8])
    ids = [0, 0]
    chooser = sampler(vocab_size=3, prompt=ids, temperature=0, repetition_penalty=2.0)
    assert [chooser.choose(logits).token_id for _ in range(3)] == [1, 2, 0]
    chooser = sampler(vocab_size=3, prompt=ids, temperature=0, frequency_penalty=0.15)
    assert [chooser.choose(logits).token_id for _ in range(4)] == [0, 1, 0, 2]


def test_padded_rows_are_never_sampled() -> None:
    """Row T15: ids past the tokenizer's are not tokens, however likely the model finds them."""
    logits = torch.full((12,), 50.0)
    logits[:10] = torch.linspace(-2, 2, 10)
    for options in (
        {"temperature": 0},
        {"temperature": 5.0},
        {"top_k": 3},
        {"top_p": 0.5},
        {"logit_bias": dict.fromkeys(range(10), -100)},
    ):
        chosen = {sampler(seed=s, **options).choose(logits).token_id for s in range(50)}
        assert max(chosen) < 10
    choice = sampler(temperature=0, logprobs=10).choose(logits)
    assert choice.top_logprobs is not None
    assert {token for token, _ in choice.top_logprobs} == set(range(10))


def test_min_tokens_puts_stops_off() -> None:
    logits = torch.tensor([0.0, 5.0, 4.0, 1.0])
    chooser = sampler(vocab_size=4, temperature=0, min_tokens=2, stops=(1, 2))
    assert [chooser.choose(logits).token_id for _ in range(3)] == [3, 3, 1]
    chooser = sampler(vocab_size=4, top_k=3, min_tokens=1, stops=(0, 1, 2))
    assert chooser.choose(logits).token_id == 3


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = torch.randn(10, generator=torch.Generator().manual_seed(0))
    raw = logits.log_softmax(0)
    choice = sampler(
        prompt=range(10), temperature=0.1, top_k=2, repetition_penalty=5.0, logprobs=3, seed=1
    ).choose(logits)
    assert choice.logprob == pytest.approx(raw[choice.token_id].item(), abs=1e-6)
    best = raw.topk(3)
    assert choice.top_logprobs is not None
    assert [token for token, _ in choice.top_logprobs] == best.indices.tolist()
    assert [p for _, p in choice.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert sampler(logprobs=0, temperature=0).choose(logits).top_logprobs == ()
    assert sampler(temperature=0).choose(logits) == Choice(int(logits.argmax()))


def test_a_seed_and_a_place_give_the_same_token_whatever_came_before() -> None:
    rows = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    first, second = sampler(seed=7), sampler(seed=7)
    tokens = [first.choose(row).token_id for row in rows]
    assert tokens == [second.choose(row).token_id for row in rows]
    other = sampler(seed=8)
    assert tokens != [other.choose(row).token_id for row in rows]
    # the numbers themselves are part of the promise: the same on every machine and version
    assert [uniform(1234, i) for i in range(3)] == PINNED


def test_random_numbers_are_even_and_independent_of_each_other() -> None:
    by_seed = [uniform(seed, 0) for seed in range(10_000)]
    by_place = [uniform(0, place) for place in range(10_000)]
    for numbers in (by_seed, by_place):
        counts = Counter(int(number * 100) for number in numbers)
        assert sum((counts[i] - 100) ** 2 / 100 for i in range(100)) < 160  # 1 in 10,000
        assert abs(torch.corrcoef(torch.tensor([numbers[1:], numbers[:-1]]))[0, 1]) < 0.04


TOP = (2**52 - 1) / 2**52  # the largest number that is drawn with


def test_a_draw_never_lands_on_weight_nothing() -> None:
    weights = numpy.array([0.0, 0.3, 0.0, 0.7, 0.0], numpy.float32)
    assert {draw(weights, number) for number in (0.0, 0.29, 0.31, 0.5, TOP)} == {1, 3}
    assert draw(weights, 0.0) == 1
    assert draw(weights, TOP) == 3
    assert draw(numpy.array([1e-30], numpy.float32), TOP) == 0
    spread = numpy.zeros(VOCAB, numpy.float32)
    spread[[600, 1500, 1535, 1536, 90_000]] = [0.1, 0.2, 0.2, 0.2, 0.3]
    found = {draw(spread, number) for number in (0.0, 0.09, 0.2, 0.4, 0.6, 0.71, TOP)}
    assert found == {600, 1500, 1535, 1536, 90_000}


@pytest.mark.parametrize("size", [1, 2, 511, 512, 513, 1024, 5000])
def test_a_draw_is_where_the_running_sum_passes(size: int) -> None:
    """Equal to the plain search, around every stretch's ends too, but where rounding decides."""
    weights = numpy.exp(normal(size, seed=size) * 3)
    weights[normal(size, seed=1) > 0.8] = 0
    weights[size // 2] = 1
    running = weights.cumsum(dtype=numpy.float64)
    edges = running[:: max(1, size // 100)] / running[-1]
    numbers = [0.0, TOP, *numpy.linspace(0, 0.999, 200), *edges - 1e-9, *edges + 1e-9]
    for number in numbers:
        if 0 <= number <= TOP:
            expected = int(numpy.searchsorted(running, number * running[-1], side="right"))
            found = draw(weights, float(number))
            assert weights[found] > 0
            assert found == expected or abs(
                running[min(found, expected)] - number * running[-1]
            ) < (1e-12 * running[-1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_p": 0.5}, {"logprobs": 2}])
def test_a_row_that_is_not_finite_gives_no_token(bad: float, options: dict[str, Any]) -> None:
    logits = torch.zeros(12)
    logits[[4, 11]] = bad
    with pytest.raises(NonFiniteError, match=r"2 of the model's 12 logits for output token 0"):
        sampler(**options).choose(logits)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-300},
        {"temperature": 100.0, "repetition_penalty": 1e-300},
        {"repetition_penalty": 100.0},
        {"presence_penalty": -100.0, "frequency_penalty": 100.0},
        {"top_p": 0.0},
        {"min_p": 1.0},
        {"top_k": 2**62},
        {"top_p": 1e-300, "min_p": 1e-300, "top_k": 2},
        {"logit_bias": {i: 100 - 200 * (i % 2) for i in range(10)}, "repetition_penalty": 100.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e30])
def test_extreme_options_still_give_a_token(options: dict[str, Any], scale: float) -> None:
    logits = torch.randn(10, generator=torch.Generator().manual_seed(0)) * scale
    chooser = sampler(prompt=range(5), **options)
    assert all(0 <= chooser.choose(logits).token_id < 10 for _ in range(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_logits_of_other_dtypes_are_sampled_in_fp32(dtype: torch.dtype) -> None:
    logits = torch.randn(10, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = sampler(logprobs=1, seed=3).choose(logits.float())
    assert sampler(logprobs=1, seed=3).choose(logits) == wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_seen_in_any_dtype(dtype: torch.dtype, bad: float) -> None:
    with pytest.raises(NonFiniteError, match="1 of the model's 3 logits"):
        sampler().choose(torch.tensor([0.5, bad, 1.0], dtype=dtype))


def test_the_models_own_row_stays_as_it_was() -> None:
    logits = torch.randn(10, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    chooser = sampler(
        prompt=range(5),
        repetition_penalty=1.5,
        presence_penalty=1.0,
        logit_bias={2: 1},
        top_k=4,
        top_p=0.9,
        min_p=0.01,
        min_tokens=3,
        stops=(1,),
        logprobs=2,
    )
    for _ in range(3):
        chooser.choose(logits)
    assert torch.equal(logits, before)


def test_a_whole_vocabulary_is_worked_on_without_torch() -> None:
    """Any torch op on it would wake a team of threads, which costs more than the work. Our own
    kernel takes a row by itself.
    """

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(  # type: ignore[no-untyped-def]
            self, func, types, args=(), kwargs=None
        ):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    called: list[str] = []
    logits = torch.from_numpy(normal(VOCAB, seed=0))
    for row in (logits, logits.to(torch.bfloat16)):
        for options in ({"temperature": 0}, {"top_k": 20, "top_p": 0.8, "logprobs": 3}, {}):
            chooser = sampler(
                vocab_size=VOCAB, prompt=[1], repetition_penalty=1.05, seed=2, **options
            )
            with Watch():  # type: ignore[no-untyped-call]
                chooser.choose(row)
    views = {"detach.default", "view.dtype", "alias.default", "unsqueeze.default", "select.int"}
    makers = {"aten.new_empty.default", "aten.lift_fresh.default"}
    assert set(called) <= {f"aten.{name}" for name in views} | makers
