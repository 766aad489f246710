"""Sampling options are checked by name and kept as plain values."""

from __future__ import annotations

import pickle
from typing import Any

import numpy
import pytest
import regex

from qwenkit.errors import RequestError
from qwenkit.types.sampling import LoopDetection, SamplingParams
from qwenkit.types.scripts import SCRIPTS

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({5: 1, 3: -100}, ((3, -100.0), (5, 1.0))),
        ({"5": 1, "0": 0.5}, ((0, 0.5), (5, 1.0))),  # as JSON has them
        ({numpy.int64(5): numpy.float32(2)}, ((5, 2.0),)),
        (((5, 1), (3, 2)), ((3, 2.0), (5, 1.0))),
        ([["7", -1]], ((7, -1.0),)),
        ({}, ()),
        (dict.fromkeys(range(1024), 0), tuple((i, 0.0) for i in range(1024))),
    ],
)
def test_biases_are_kept_as_pairs_in_the_order_of_their_ids(given: Any, kept: object) -> None:
    params = SamplingParams(logit_bias=given)
    assert params.logit_bias == kept
    assert params.replace(logit_bias=params.logit_bias) == params
    assert hash(params) == hash(pickle.loads(pickle.dumps(params)))


@pytest.mark.parametrize(
    "given",
    [
        None,
        5,
        "5",
        [5],
        [(5,)],
        [(5, 1, 2)],
        [([], 1)],
        {5: None},
        {5: "1"},
        {5: True},
        {5: 100.5},
        {5: -101},
        {5: 1e308},
        {5: NAN},
        {5: INF},
        {-1: 1},
        {"-1": 1},
        {"x": 1},
        {"": 1},
        {"1" * 5000: 1},
        {"٣": 1},
        {True: 1},
        {1.5: 1},
        {2**63: 1},
        {5: 1, "5": 1},
        {"5": 1, "05": 1},
        [(5, 1), (5, 2)],
        dict.fromkeys(range(1025), 0),
    ],
    ids=lambda given: str(given)[:40],
)
def test_what_is_no_bias_is_refused_by_name(given: Any) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(logit_bias=given)
    assert error.value.field == "logit_bias"
    assert len(str(error.value)) < 6000


def test_scripts_have_unicodes_spelling() -> None:
    params = SamplingParams(allowed_scripts=("latin", "OL CHIKI", "Sign-Writing", "Common"))
    assert params.allowed_scripts == ("Latin", "Ol_Chiki", "SignWriting", "Common")
    assert SamplingParams(allowed_scripts="Han").allowed_scripts == ("Han",)  # type: ignore[arg-type]
    assert len(SCRIPTS) == len(set(SCRIPTS)) == 163  # of Unicode 15.1, with Common and Inherited
    for name in SCRIPTS:
        regex.compile(rf"\p{{Script={name}}}")


@pytest.mark.parametrize("given", [None, 5, ("Latn",), ("",), (5,), ("Latin}",), {"Latin"}])
def test_what_is_no_script_is_refused_by_name(given: Any) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(allowed_scripts=given)
    assert error.value.field == "allowed_scripts"
    with pytest.raises(RequestError, match="'Cyrillic'"):
        SamplingParams(allowed_scripts=("Cyrilic",))


def test_loop_detection_is_a_switch_or_its_numbers() -> None:
    def kept(given: Any) -> LoopDetection | None:
        return SamplingParams(loop_detection=given).loop_detection

    assert kept(None) is kept(False) is None
    assert kept(True) == kept({}) == LoopDetection()
    assert kept({"repeats": numpy.int64(3)}) == LoopDetection(repeats=3)
    own = LoopDetection(repeats=2, tokens=2, longest=1)
    assert kept(own) is own


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (4, "loop_detection"),
        ("yes", "loop_detection"),
        ({"repeat": 3}, "loop_detection"),
        ({3: 3}, "loop_detection"),
        ({"repeats": 1}, "loop_detection.repeats"),
        ({"tokens": 1}, "loop_detection.tokens"),
        ({"tokens": 5.0}, "loop_detection.tokens"),
        ({"longest": 0}, "loop_detection.longest"),
        ({"longest": 4097}, "loop_detection.longest"),
        ({"longest": True}, "loop_detection.longest"),
    ],
)
def test_what_is_no_loop_detection_is_refused_by_name(given: Any, field: str) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(loop_detection=given)
    assert error.value.field == field


@pytest.mark.parametrize("given", [-1, 129, 1.0, True, "3", 2**70])
def test_prompt_logprobs_are_bounded(given: Any) -> None:
    assert SamplingParams(prompt_logprobs=128).prompt_logprobs == 128
    with pytest.raises(RequestError) as error:
        SamplingParams(prompt_logprobs=given)
    assert error.value.field == "prompt_logprobs"


@pytest.mark.parametrize(
    ("field", "given", "words"),
    [
        ("stop", [f"word {i}" for i in range(1025)], "got 1025 entries; allowed: 1024"),
        ("stop", ["a" * 65_000, "b" * 537], "got 65537 characters in all; allowed: 65536"),
        ("stop_token_sequences", [[i] for i in range(1025)], "got 1025 entries; allowed: 1024"),
        ("stop_token_sequences", [[1] * 65_537], "got 65537 ids in all; allowed: 65536"),
    ],
)
def test_more_stops_than_a_step_has_time_for_are_refused(
    field: str, given: list[Any], words: str
) -> None:
    with pytest.raises(RequestError, match=f"^{field}: {words}"):
        SamplingParams.from_mapping({field: given})
