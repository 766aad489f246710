"""What is refused before it reaches the engine, and with which words."""

from __future__ import annotations

from typing import Any

import pytest

from qwenkit.engine.request import Limits, Request, check_request, stop_ids
from qwenkit.engine.settings import EngineSettings
from qwenkit.errors import RequestError, UsageError
from qwenkit.types.sampling import SamplingParams

LIMITS = Limits(context_tokens=20, cache_tokens=32, vocab_size=258)


def request(*ids: int, **sampling: object) -> Request:
    return Request("r", ids, SamplingParams.from_mapping(sampling))


def test_a_prompt_that_leaves_room_for_one_token_is_taken() -> None:
    check_request(request(*range(19)), LIMITS)
    assert LIMITS.output_tokens(request(*range(19), max_tokens=5)) == 1
    assert LIMITS.output_tokens(request(1, 2)) == 18
    assert LIMITS.output_tokens(request(1, 2, max_tokens=5)) == 5


@pytest.mark.parametrize("count", [20, 21, 40, 20_000])
def test_a_longer_one_is_refused_with_both_counts(count: int) -> None:
    with pytest.raises(RequestError, match=rf"prompt has {count} tokens, the context 20"):
        check_request(request(*[1] * count), LIMITS)


def test_a_small_cache_is_named_as_the_reason() -> None:
    limits = Limits(context_tokens=64, cache_tokens=16, vocab_size=258)
    with pytest.raises(RequestError, match=r"KV cache 16, .* raise kv_cache_tokens"):
        check_request(request(*[1] * 16), limits)


@pytest.mark.parametrize(
    ("wrong", "field", "message"),
    [
        (request(), "prompt_ids", "empty"),
        (request(1, 258), "prompt_ids", "258 is outside the vocabulary; allowed: 0 to 257"),
        (request(-1), "prompt_ids", "-1 is outside"),
        (request(2**70), "prompt_ids", "outside"),
        (request(True), "prompt_ids", "whole numbers, got True"),
        (Request("r", ("1",)), "prompt_ids", "whole numbers, got '1'"),  # type: ignore[arg-type]
        (request(1, stop_token_ids=(300,)), "stop_token_ids", "300"),
        (request(1, stop_token_sequences=((1,), (2, 999))), "stop_token_sequences[1]", "999"),
        (request(1, logprobs=259), "logprobs", "has 258 tokens"),
        (request(1, logit_bias={257: 1, 258: 1}), "logit_bias", "258 is outside the vocabulary"),
    ],
)
def test_what_cannot_be_served_is_refused_by_field(
    wrong: Request, field: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        check_request(wrong, LIMITS)
    assert caught.value.field == field


def test_a_small_vocabulary_bounds_what_is_said_of_a_prompt() -> None:
    limits = Limits(context_tokens=20, cache_tokens=32, vocab_size=100)
    check_request(request(1, prompt_logprobs=100), limits)
    with pytest.raises(RequestError, match=r"prompt_logprobs: got 101; .* has 100 tokens"):
        check_request(request(1, prompt_logprobs=101), limits)


def test_stop_ids_come_from_the_model_the_request_and_control_names() -> None:
    sampling = SamplingParams(stop_token_ids=(7,), stop=("<end>", "text"))
    control = {"<eos>": 256, "<end>": 257}
    assert stop_ids(sampling, (256,), control) == {256: 256, 7: 7, 257: "<end>"}
    assert stop_ids(sampling.replace(ignore_eos=True), (256,), control) == {7: 7, 257: "<end>"}


def test_settings_are_checked_and_count_blocks() -> None:
    assert EngineSettings().num_blocks(100) == 7
    assert EngineSettings(kv_cache_tokens=100, block_tokens=8).num_blocks(10**6) == 13
    for field in ("block_tokens", "kv_cache_tokens", "max_batch_tokens", "max_sequences"):
        for value in (0, -1, 1.5, True, "8"):
            given: Any = {field: value}
            with pytest.raises(UsageError, match=rf"^{field}: expected a whole number"):
                EngineSettings(**given)
    for field in ("prefix_cache", "reference_ops"):
        given = {field: "no"}
        with pytest.raises(UsageError, match=rf"^{field}: expected true or false, got 'no'"):
            EngineSettings(**given)
    with pytest.raises(UsageError, match="max_sequences: 9 is above max_batch_tokens 8"):
        EngineSettings(max_batch_tokens=8, max_sequences=9)
    assert EngineSettings(kv_cache_tokens=4).num_blocks(4) == 1
    with pytest.raises(UsageError, match=r"^kv_dtype: got 'fp16'\. .*'bf16'"):
        EngineSettings(kv_dtype="fp16")
