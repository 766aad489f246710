"""Penalties and filters against transformers' logits processors, and penalties against OpenAI's
published formula.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch

from qwenkit.engine.sampler import Sampler, candidates, penalize_counts, penalize_repetition
from qwenkit.types.sampling import SamplingParams

pytestmark = pytest.mark.oracle
transformers = pytest.importorskip("transformers")

VOCAB_SIZE = 3000


def scores(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 4


def sampler(*, prompt: Sequence[int] = (), seed: int = 0, **options: Any) -> Sampler:
    params = SamplingParams.from_mapping(options)
    return Sampler(params, prompt_ids=prompt, seed=seed, vocab_size=VOCAB_SIZE, stop_ids=())


def theirs(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    warpers = [transformers.TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        warpers.append(transformers.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(transformers.MinPLogitsWarper(params.min_p))
    result = row[None]
    for warper in warpers:
        result = warper(torch.zeros(1, 1, dtype=torch.int64), result)
    return result[0].softmax(0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.3},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 20},
        {"top_k": VOCAB_SIZE + 5},
        {"top_p": 0.1},
        {"top_p": 0.8},
        {"top_p": 0.999, "temperature": 5.0},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20},  # Qwen2's own defaults
        {"temperature": 1.2, "top_p": 0.9, "top_k": 50, "min_p": 0.1},
    ],
    ids=str,
)
def test_filters_leave_the_same_distribution(seed: int, options: dict[str, float]) -> None:
    params = SamplingParams.from_mapping(options)
    row = scores(seed)
    ids, weights = candidates(row.numpy(), params)
    ours = torch.zeros(VOCAB_SIZE)
    ours[slice(None) if ids is None else torch.from_numpy(ids)] = torch.from_numpy(
        weights / weights.sum()
    )
    expected = theirs(row, params)
    assert torch.equal(ours > 0, expected > 0)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


def test_equal_scores_at_the_bound_of_top_k_all_stay() -> None:
    row = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0])
    params = SamplingParams(top_k=2)
    ids, _ = candidates(row.numpy(), params)
    assert ids is not None
    assert set(ids.tolist()) == set(theirs(row, params).nonzero()[:, 0].tolist()) == {1, 2, 3, 5}


@pytest.mark.parametrize("penalty", [0.5, 1.05, 1.1, 3.0])
def test_repetition_penalty(penalty: float) -> None:
    row = scores(9)
    ids = torch.randint(0, VOCAB_SIZE, (1, 200), generator=torch.Generator().manual_seed(1))
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, row[None])[0]
    seen = numpy.unique(ids[0].numpy())
    ours = row.clone()
    ours[seen] = torch.from_numpy(penalize_repetition(row.numpy()[seen], penalty))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_biases_are_added_as_theirs(seed: int) -> None:
    row = scores(seed)
    biases = {7: -100.0, 0: 2.5, VOCAB_SIZE - 1: 100.0, 12: 0.0}
    processor = transformers.SequenceBiasLogitsProcessor({(i,): b for i, b in biases.items()})
    expected = processor(torch.zeros(1, 4, dtype=torch.int64), row[None])[0]
    ours = row.clone()
    sampler(logit_bias=biases)._adjust(ours.numpy())
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
        {"temperature": 1.2, "repetition_penalty": 1.3, "logit_bias": {3: 4.0, 9: -100.0}},
        {"repetition_penalty": 0.8, "logit_bias": {5: 6.0}, "top_p": 0.95, "min_p": 0.02},
    ],
    ids=str,
)
def test_all_rules_in_their_order_leave_the_same_distribution(
    seed: int, options: dict[str, Any]
) -> None:
    """Repetition penalty, biases (which OpenAI adds to what the penalties left), then the rest; and
    of that distribution each token is drawn as often.
    """
    params = SamplingParams.from_mapping(options)
    row = scores(seed)
    prompt = torch.randint(0, VOCAB_SIZE, (60,), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat((prompt, row.topk(30).indices))[None]  # some that matter
    processed = transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(
        ids, row[None]
    )
    if params.logit_bias:
        biases = {(i,): b for i, b in params.logit_bias}
        processed = transformers.SequenceBiasLogitsProcessor(biases)(ids, processed)
    expected = theirs(processed[0], params)
    drawn: Counter[int] = Counter()
    for number in range(2000):
        chooser = sampler(prompt=ids[0].tolist(), seed=number, **options)
        drawn[chooser.choose(row).token_id] += 1
    assert all(expected[token] > 0 for token in drawn)
    likely = [token for token in expected.topk(8).indices.tolist() if expected[token] > 0.005]
    for token in likely:  # within 5 standard deviations
        p = expected[token].item()
        assert abs(drawn[token] - 2000 * p) < 5 * (2000 * p * (1 - p)) ** 0.5 + 1e-9


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_takes_the_largest_of_their_scores(seed: int, penalty: float) -> None:
    row = scores(seed)
    ids = row.topk(3).indices[None]
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, row[None])[0].argmax()
    chooser = sampler(prompt=ids[0].tolist(), temperature=0, repetition_penalty=penalty)
    assert chooser.choose(row).token_id == expected.item()


def test_presence_and_frequency_penalties_follow_the_published_formula() -> None:
    """mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence."""
    row = scores(10)
    output = torch.randint(0, 50, (200,), generator=torch.Generator().manual_seed(2)).tolist()
    counts = Counter(output)
    ids, used = list(counts), numpy.array(list(counts.values()), numpy.float32)
    ours = penalize_counts(row.numpy()[ids], used, 0.6, 0.3)
    for token, penalized in zip(ids, ours.tolist(), strict=True):
        expected = row[token].item() - output.count(token) * 0.3 - 0.6
        assert penalized == pytest.approx(expected, abs=1e-5)
