"""Rows of one step chosen from in one native call: as row by row in numpy, and as each alone."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from qwenkit.engine import sampler as sampling_module
from qwenkit.engine.sampler import NOT_FINITE, Sampler, choose_together, together
from qwenkit.errors import NonFiniteError
from qwenkit.kernels.cpu import register
from qwenkit.types.sampling import SamplingParams

VOCAB, ROWS = 5003, 5024  # the last are padding


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    if register().variant is None:
        pytest.skip("no native kernels here")


def some_options(rng: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.3, 0.7, 1.0, 2.0]),
        "top_k": rng.choice([0, 1, 2, 20, 100, 1024]),
        "top_p": rng.choice([1.0, 1.0, 0.95, 0.8, 0.1]),
        "min_p": rng.choice([0.0, 0.0, 0.05, 0.5]),
        "repetition_penalty": rng.choice([1.0, 1.05, 1.3, 0.8]),
        "presence_penalty": rng.choice([0.0, 0.0, 1.5, -1.0]),
        "frequency_penalty": rng.choice([0.0, 0.5]),
        "logit_bias": {rng.randrange(VOCAB): rng.uniform(-5, 5) for _ in range(rng.choice([0, 9]))},
        "min_tokens": rng.choice([0, 3]),
        "seed": rng.randrange(2**31),
    }
    if options["top_k"] == 0 and options["temperature"] != 0:
        options["top_p"] = 1.0  # else it is numpy's
    return options


def make(options: dict[str, Any]) -> Sampler:
    params = SamplingParams.from_mapping(options)
    rng = random.Random(options["seed"])
    prompt = [rng.randrange(VOCAB) for _ in range(40)]
    return Sampler(
        params, prompt_ids=prompt, seed=options["seed"], vocab_size=VOCAB, stop_ids=[7, 8]
    )


def test_the_same_tokens_as_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six tokens of 40 requests of all kinds of options, with the ties that rounding makes."""
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    given = [some_options(rng) for _ in range(40)]
    alone, many = [make(each) for each in given], [make(each) for each in given]
    for step in range(6):
        logits = torch.randn(len(given), ROWS, generator=generator) * 3
        logits[::3] = (logits[::3] * 2).round() / 2
        logits[:, 7] += 9.0  # a stop, which may come too early
        before = logits.clone()
        tokens = choose_together(many, logits, range(len(logits)))
        assert torch.equal(logits, before)
        chosen = [each.remember(token) for each, token in zip(many, tokens, strict=True)]
        with monkeypatch.context() as patch:
            patch.setattr(sampling_module, "together", lambda logits: False)
            expected = [each.choose(row) for each, row in zip(alone, logits, strict=True)]
        assert chosen == expected, step


def test_a_row_has_the_token_that_it_has_alone() -> None:
    rng = random.Random(6)
    given = [some_options(rng) for _ in range(9)]
    logits = torch.randn(9, ROWS, generator=torch.Generator().manual_seed(6)) * 3
    tokens = choose_together([make(each) for each in given], logits, range(len(logits)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert choose_together([make(each) for each in given], logits, range(len(logits))) == tokens
    finally:
        torch.set_num_threads(threads)
    assert together(logits[0])
    assert [make(o).choose(row).token_id for o, row in zip(given, logits, strict=True)] == tokens


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 64, VOCAB - 1, ROWS - 1])
def test_only_the_row_that_is_not_finite_fails(bad: float, place: int) -> None:
    logits = torch.randn(3, ROWS, generator=torch.Generator().manual_seed(7))
    samplers = [make({"seed": 1, "logit_bias": {0: 1.0, 64: -100}}) for _ in range(3)]
    fine = choose_together(samplers, logits, range(len(logits)))
    logits[1, place] = bad
    tokens = choose_together(samplers, logits, range(len(logits)))
    assert tokens == [fine[0], NOT_FINITE, fine[2]]
    with pytest.raises(NonFiniteError, match=f"1 of the model's {ROWS} logits"):
        samplers[1].choose(logits[1])
