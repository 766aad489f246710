"""What a sampler makes of a row of logits: penalties, biases, limits, seeds, log-probabilities."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qwenkit.engine.sampler import Choice, candidates, draw, uniform
from qwenkit.errors import NonFiniteError
from qwenkit.types.sampling import SamplingParams
from samplers import VOCAB, adjusted, after, listed, normal, reference, sampler

PINNED = [0.0870176532990985, 0.7930227924837461, 0.5203931175836789]  # of seed 1234


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
            sizes = [a.numel() for a in args if isinstance(a, torch.Tensor)]
            called.append((str(func), max(sizes, default=0)))
            return func(*args, **(kwargs or {}))

    called: list[tuple[str, int]] = []
    logits = torch.from_numpy(normal(VOCAB, seed=0))
    for row in (logits, logits.to(torch.bfloat16)):
        for options in ({"temperature": 0}, {"top_k": 20, "top_p": 0.8, "logprobs": 3}, {}):
            chooser = sampler(
                vocab_size=VOCAB, prompt=[1], repetition_penalty=1.05, seed=2, **options
            )
            with Watch():  # type: ignore[no-untyped-call]
                chooser.choose(row)
    views = {"detach.default", "view.dtype", "alias.default", "unsqueeze.default", "select.int"}
    views.add("as_strided.default")
    makers = {"aten.new_empty.default", "aten.lift_fresh.default"}
    large = {name for name, size in called if size > 1000}
    assert large <= {f"aten.{name}" for name in views} | makers
