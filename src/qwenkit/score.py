"""How likely a model finds tokens, and how far two models' answers lie apart, from rows of logits.

Logits [rows, vocab_size] may have any float dtype; everything is computed in fp64, each row by
itself and some rows at a time, so a row's figure does not depend on the others. Logarithms are
natural.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_NUMBERS_AT_ONCE = 1 << 22  # of fp64: 32 MiB for each of what is made of them


@dataclass(frozen=True, slots=True)
class Score:
    """The log-likelihood of `tokens` as the continuation of a context.

    `token_logprobs` has one number a token, `logprob_sum` is their sum; `is_greedy`: the model
    itself would have chosen each of them, ties included.
    """

    logprob_sum: float
    token_logprobs: tuple[float, ...]
    is_greedy: bool
    tokens: tuple[int, ...]


def score(logits: torch.Tensor, tokens: torch.Tensor) -> Score:
    """The score of tokens [rows] int64, each by the row [vocab_size] of logits before it."""
    logprobs = token_logprobs(logits, tokens).tolist()
    return Score(
        logprob_sum=math.fsum(logprobs),
        token_logprobs=tuple(logprobs),
        is_greedy=bool(is_greedy(logits, tokens).all()),
        tokens=tuple(tokens.tolist()),
    )


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The logarithm of each token's probability, fp64 [rows]; tokens is [rows] int64."""
    pieces = [
        torch.log_softmax(logits[part].double(), -1).gather(-1, tokens[part, None])[:, 0]
        for part in _parts(logits)
    ]
    return torch.cat(pieces) if pieces else logits.new_empty(0, dtype=torch.float64)


def is_greedy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Whether no other token has a larger logit, bool [rows]."""
    return logits.gather(-1, tokens[:, None])[:, 0] == logits.amax(-1)


def perplexity(mean_logprob: float) -> float:
    """e to the mean negative log-likelihood of a token; at most e^700, which fp64 and JSON have."""
    return math.exp(min(-mean_logprob, 700.0))


def kl_divergence(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row, fp64 [rows] in nats: p of `logits`, q of `others` [rows, vocab_size].

    What p gives no probability adds nothing.
    """
    pieces = []
    for part in _parts(logits):
        p, q = (torch.log_softmax(x[part].double(), -1) for x in (logits, others))
        weights = p.exp()
        pieces.append(torch.where(weights > 0, weights * (p - q), 0.0).sum(-1))
    return torch.cat(pieces) if pieces else logits.new_empty(0, dtype=torch.float64)


def top1_agreement(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Whether both rows have the same likeliest token, the first of equal ones, bool [rows]."""
    return logits.argmax(-1) == others.argmax(-1)


def _parts(logits: torch.Tensor) -> Iterator[slice]:
    step = max(1, _NUMBERS_AT_ONCE // logits.shape[1])
    for first in range(0, len(logits), step):
        yield slice(first, first + step)
