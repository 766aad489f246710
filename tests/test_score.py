"""Likelihoods and distances of rows of logits, against numbers written out."""

from __future__ import annotations

import math

import pytest
import torch

from qwenkit import score
from qwenkit.score import Score


def rows(count: int, vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def written_out(row: list[float]) -> list[float]:
    """Logarithms of a row's probabilities."""
    total = math.fsum(math.exp(x) for x in row)
    return [x - math.log(total) for x in row]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logprobs_are_those_written_out(dtype: torch.dtype) -> None:
    logits, tokens = rows(7).to(dtype), torch.tensor([0, 49, 3, 3, 7, 20, 11])
    expected = [
        written_out(row)[token]
        for row, token in zip(logits.double().tolist(), tokens.tolist(), strict=True)
    ]
    got = score.token_logprobs(logits, tokens)
    assert got.dtype is torch.float64
    assert got.tolist() == pytest.approx(expected, rel=1e-12)
    made = score.score(logits, tokens)
    assert made == Score(
        math.fsum(got.tolist()), tuple(got.tolist()), False, tuple(tokens.tolist())
    )


def test_greedy_is_what_has_no_larger_logit() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])
    assert score.score(logits, torch.tensor([1, 0])).is_greedy
    assert score.score(logits, torch.tensor([2, 0])).is_greedy  # a tie
    assert not score.score(logits, torch.tensor([1, 2])).is_greedy


def test_perplexity_is_finite_whatever_comes() -> None:
    assert score.perplexity(-math.log(50)) == pytest.approx(50)
    assert math.isfinite(score.perplexity(-1e9))


def test_kl_is_zero_of_the_same_and_as_written_out_of_others() -> None:
    p, q = rows(4, seed=1), rows(4, seed=2)
    assert score.kl_divergence(p, p + 5).abs().max() < 1e-12
    expected = []
    for a, b in zip(p.double().tolist(), q.double().tolist(), strict=True):
        pairs = zip(written_out(a), written_out(b), strict=True)
        expected.append(math.fsum(math.exp(x) * (x - y) for x, y in pairs))
    assert score.kl_divergence(p, q).tolist() == pytest.approx(expected, rel=1e-9)
    p[:, 3] = q[:, 3] = -math.inf
    assert score.kl_divergence(p, q).isfinite().all()


def test_agreement_is_of_the_likeliest_token() -> None:
    p, q = rows(5), rows(5).neg()
    assert score.top1_agreement(p, p * 2 + 1).all()
    assert not score.top1_agreement(p, q).any()


def test_a_row_is_the_same_beside_any_others(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, tokens = rows(9), torch.arange(9)
    whole = score.token_logprobs(logits, tokens), score.kl_divergence(logits, rows(9, seed=3))
    monkeypatch.setattr(score, "_NUMBERS_AT_ONCE", 100)  # two rows at a time
    assert torch.equal(score.token_logprobs(logits, tokens), whole[0])
    assert torch.equal(score.kl_divergence(logits, rows(9, seed=3)), whole[1])
    assert torch.equal(score.token_logprobs(logits[4:5], tokens[4:5]), whole[0][4:5])
    assert score.token_logprobs(logits[:0], tokens[:0]).shape == (0,)
