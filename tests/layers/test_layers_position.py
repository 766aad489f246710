"""What is decided from a position spec for a sequence, and the tables that follow from it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.layers.attention import PackedCausal
from qwenkit.layers.position import (
    Alibi,
    DualChunk,
    Dynamic,
    Linear,
    Position,
    QwenNtk,
    Rotary,
    Yarn,
    allowed_tokens,
    at_position,
    choose_extension,
    covered_tokens,
    extended,
    qwen_alpha,
    reachable_tokens,
    trained_tokens,
)
from qwenkit.layers.rope import log_n_scale, rotary_tables
from qwenkit.types.extension import NO_EXTENSION, Extension, RopeMode

PLAIN = Rotary(16, 10000.0)
YARN = Rotary(16, 10000.0, Yarn(factor=4.0, trained_tokens=64))
QWEN = Rotary(16, 10000.0, QwenNtk(trained_tokens=64), log_n=64)
DYNAMIC = Rotary(16, 10000.0, Dynamic(factor=2.0, trained_tokens=64))
LINEAR = Rotary(16, 10000.0, Linear(factor=4.0))
CHUNKS = DualChunk(rotary=PLAIN, chunk_tokens=48, local_tokens=4, trained_tokens=64)
ALIBI = Alibi((0.5, 0.25))
SPECS: list[Position] = [PLAIN, YARN, QWEN, DYNAMIC, LINEAR, CHUNKS, ALIBI, None]
PER_REQUEST: RopeMode = "per-request"
AS_CONFIG: RopeMode = "as-config"


def choose(position: Position, mode: RopeMode, prompt: int, total: int | None = None) -> Extension:
    return choose_extension(
        position,
        mode,
        trained_tokens=64,
        prompt_tokens=prompt,
        total_tokens=prompt if total is None else total,
    )


@pytest.mark.parametrize(
    ("share", "alpha"),
    [
        *((0.01, 1), (0.5, 1), (1, 1), (1.01, 3), (1.5, 3), (2, 3)),
        *((2.01, 7), (3, 7), (4, 7), (4.01, 15), (6, 15), (8, 15), (8.01, 31)),
    ],
)
def test_qwens_alpha_by_the_length(share: float, alpha: int) -> None:
    assert qwen_alpha(round(share * 8192), 8192) == alpha


@pytest.mark.parametrize("mode", [PER_REQUEST, AS_CONFIG])
def test_qwens_alpha_is_decided_by_the_prompt_alone(mode: RopeMode) -> None:
    assert choose(QWEN, mode, 64, 500) == NO_EXTENSION
    assert choose(QWEN, mode, 65, 66) == Extension("qwen-ntk", 3.0, 64)
    stretched = extended(QWEN, Extension("qwen-ntk", 3.0, 64))
    assert stretched == Rotary(16, 10000.0 * 3 ** (16 / 14), None, log_n=64)


@pytest.mark.parametrize(
    ("total", "factor"), [(1, 1), (64, 1), (65, 2), (128, 2), (129, 4), (256, 4), (300, 4)]
)
@pytest.mark.parametrize("spec", [PLAIN, YARN], ids=["plain", "yarn"])
def test_yarn_takes_the_smallest_factor_that_reaches(
    spec: Rotary, total: int, factor: float
) -> None:
    expected = Extension("yarn", factor, 64) if factor > 1 else NO_EXTENSION
    assert choose(spec, PER_REQUEST, 1, total) == expected
    assert choose(YARN, AS_CONFIG, 1, total) == Extension("yarn", 4.0, 64)
    assert choose(PLAIN, AS_CONFIG, 1, total) == NO_EXTENSION


def test_a_config_factor_that_is_no_power_of_two_is_the_last_step() -> None:
    spec = Rotary(16, 1e4, Yarn(factor=3.0, trained_tokens=64, attention_factor=1.7))
    factors = [choose(spec, PER_REQUEST, 1, total).factor for total in (64, 65, 128, 129, 192, 193)]
    assert factors == [1, 2, 2, 3, 3, 4]
    # the config's attention factor was made for its own factor and belongs to no other
    kept = [extended(spec, choose(spec, PER_REQUEST, 1, n)).scaling for n in (100, 192)]
    assert [s.attention_factor for s in kept if isinstance(s, Yarn)] == [None, 1.7]


def test_dynamic_grows_as_transformers_or_stays_as_planned() -> None:
    assert choose(DYNAMIC, PER_REQUEST, 10, 64) == NO_EXTENSION
    planned = choose(DYNAMIC, PER_REQUEST, 10, 100)
    assert at_position(planned, 120) == planned
    assert covered_tokens(DYNAMIC, PER_REQUEST, planned, 64) == 100
    growing = choose(DYNAMIC, AS_CONFIG, 80, 100)
    assert [at_position(growing, p).planned_tokens for p in (0, 79, 80, 81)] == [80, 80, 81, 82]
    below = choose(DYNAMIC, AS_CONFIG, 10, 100)
    assert [at_position(below, p).planned_tokens for p in (0, 63, 64)] == [64, 64, 65]
    assert extended(DYNAMIC, at_position(below, 63)).base == PLAIN.base


def test_what_a_model_was_trained_with_is_always_on() -> None:
    for mode in (PER_REQUEST, AS_CONFIG):
        assert choose(LINEAR, mode, 5) == Extension("linear", 4.0)
        assert extended(LINEAR, choose(LINEAR, mode, 5)) == LINEAR
        assert choose(ALIBI, mode, 500) == NO_EXTENSION
        assert choose(None, mode, 500) == NO_EXTENSION


def test_dual_chunk_attention_is_for_more_than_one_chunk() -> None:
    assert choose(CHUNKS, PER_REQUEST, 30, 44) == NO_EXTENSION
    assert covered_tokens(CHUNKS, PER_REQUEST, NO_EXTENSION, 64) == 44
    assert choose(CHUNKS, PER_REQUEST, 30, 45) == Extension("dual-chunk", 1.0, 64)
    factor = 1 + 0.1 * math.log(100 / 64)
    assert choose(CHUNKS, PER_REQUEST, 100) == Extension("dual-chunk", factor, 64)


@given(
    spec=st.sampled_from(SPECS),
    mode=st.sampled_from([PER_REQUEST, AS_CONFIG]),
    prompt=st.integers(1, 600),
    more=st.integers(0, 600),
)
def test_a_choice_covers_what_it_was_made_for(
    spec: Position, mode: RopeMode, prompt: int, more: int
) -> None:
    total = min(prompt + more, reachable_tokens(spec, 64, mode))
    if total < prompt:
        return
    chosen = choose(spec, mode, prompt, total)
    covered = covered_tokens(spec, mode, chosen, 64)
    assert covered is None or covered >= total
    if prompt <= 44 and total <= 44 and mode == "per-request" and not isinstance(spec, Rotary):
        assert chosen == NO_EXTENSION
    if isinstance(spec, Rotary) and not isinstance(spec.scaling, Linear) and total <= 64:
        below = extended(spec, choose(spec, "per-request", prompt, total))
        assert (below.base, below.scaling) == (PLAIN.base, None)


@pytest.mark.parametrize(
    ("spec", "trained", "allowed", "asked", "always"),
    [
        (PLAIN, 100, 100, 400, 100),
        (YARN, 64, 256, 256, 256),
        (Rotary(16, 1e4, Yarn(factor=2.0, trained_tokens=64)), 64, 128, 256, 128),
        (Rotary(16, 1e4, Yarn(factor=8.0, trained_tokens=64)), 64, 512, 512, 512),
        (QWEN, 64, 100, 512, 100),
        (DYNAMIC, 64, 128, 128, 128),
        (LINEAR, 100, 100, 100, 100),
        (CHUNKS, 100, 100, 100, 100),
        (ALIBI, 100, 100, 100, 100),
        (None, 100, 100, 100, 100),
    ],
)
def test_lengths_that_are_trained_allowed_and_to_be_had(
    spec: Position, trained: int, allowed: int, asked: int, always: int
) -> None:
    assert trained_tokens(spec, 100) == trained
    assert allowed_tokens(spec, 100) == allowed
    assert reachable_tokens(spec, 100, PER_REQUEST) == asked
    assert reachable_tokens(spec, 100, AS_CONFIG) == always


def test_log_n_is_one_up_to_the_trained_length_and_never_ends() -> None:
    positions = torch.tensor([0, 30, 31, 32, 1023, 100_000])
    scale = log_n_scale(32, positions)
    assert scale[:3].tolist() == [1, 1, 1]
    expected = [math.log(n, 32) for n in (33, 1024, 100_001)]
    torch.testing.assert_close(scale[3:], torch.tensor(expected))


def test_a_tokens_rows_do_not_depend_on_the_other_sequences() -> None:
    positions = torch.tensor([0, 5, 100, 5, 100, 3000])
    yarn = extended(YARN, Extension("yarn", 2.0, 64))
    index = torch.tensor([0, 0, 0, 1, 1, 1])
    both = rotary_tables((PLAIN, yarn), positions, index)
    for spec, rows in ((PLAIN, slice(0, 3)), (yarn, slice(3, 6))):
        for mixed, alone in zip(both, rotary_tables(spec, positions[rows]), strict=True):
            assert torch.equal(mixed[rows], alone)


def attend(position: Position, lengths: list[int], **settings: Any) -> torch.Tensor:
    rng = torch.Generator().manual_seed(7)
    q, k, v = torch.randn(3, 200, 2, 16, generator=rng)[:, : sum(lengths)].unbind()
    return PackedCausal(lengths, **settings).attend(0, q, k, v, position)


@pytest.mark.parametrize("spec", [YARN, QWEN, DYNAMIC], ids=["yarn", "qwen", "dynamic"])
def test_up_to_the_trained_length_packed_sequences_are_as_they_were(spec: Rotary) -> None:
    settings: dict[str, Any] = {"rope": "per-request", "trained_tokens": 64}
    plain = attend(PLAIN, [64, 100], rope="as-config")
    got = attend(spec, [64, 100], **settings)
    assert torch.equal(got[:64], plain[:64])
    assert not torch.allclose(got[64:], plain[64:], atol=1e-3)


def test_the_first_qwen_leaves_its_extensions_out_in_training() -> None:
    assert torch.equal(attend(QWEN, [150], training=True), attend(PLAIN, [150]))
    assert not torch.equal(attend(QWEN, [150]), attend(PLAIN, [150]))
    # LogN alone: a query at n > 64 weighs its scores by log(n) to the base 64
    log_n = Rotary(16, 10000.0, log_n=64)
    got, plain = attend(log_n, [150]), attend(PLAIN, [150])
    assert torch.equal(got[:64], plain[:64])
    assert (got[64:] - plain[64:]).abs().max() > 1e-4


@pytest.mark.parametrize("window", [1, 3, 16, 39, 40, 100])
@pytest.mark.parametrize("position", [None, ALIBI, PLAIN], ids=["none", "alibi", "rotary"])
def test_windows_and_alibi_written_out(position: Position, window: int) -> None:
    rng = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 40, 2, 16, generator=rng, dtype=torch.float64).unbind()
    got = PackedCausal([40]).attend(0, q, k, v, position, window=window)
    if position == PLAIN:
        q, k = (_rotated(x) for x in (q, k))
    for head in range(2):
        for row in range(40):
            seen = range(max(0, row - window + 1), row + 1)
            scores = torch.stack([q[row, head] @ k[j, head] / 4 for j in seen])
            if position == ALIBI:
                slope = ALIBI.slopes[head]
                scores = scores - slope * torch.tensor([row - j for j in seen]).double()
            expected = scores.softmax(0) @ torch.stack([v[j, head] for j in seen])
            torch.testing.assert_close(got[row, head], expected, rtol=0, atol=1e-6)


def _rotated(x: torch.Tensor) -> torch.Tensor:
    cos, sin = (t[:, None].double() for t in rotary_tables(PLAIN, torch.arange(40)))
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
