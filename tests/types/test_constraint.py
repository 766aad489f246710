"""What is taken as a constraint, what it is kept as, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from qwenkit.errors import RequestError
from qwenkit.types.constraint import ANY_OBJECT, MOST_BYTES, Constraint
from qwenkit.types.sampling import SamplingParams


def test_a_schema_is_kept_as_text_and_a_choice_without_doubles() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    kept = Constraint.from_mapping({"json_schema": schema})
    text = '{"type": "object", "properties": {"b": {}, "a": {}}}'
    assert kept == Constraint(json_schema=text)
    assert (kept.kind, kept.json_schema) == ("json_schema", text)
    assert Constraint.from_mapping({"json_schema": True}).json_schema == ANY_OBJECT
    assert Constraint.from_mapping({"choice": ["yes", "no", "yes"]}).choice == ("yes", "no")


def test_sampling_takes_a_mapping_and_can_still_be_compared_and_hashed() -> None:
    one = SamplingParams.from_mapping({"constraint": {"regex": "a+"}})
    assert one.constraint == Constraint(regex="a+")
    assert hash(one) == hash(SamplingParams(constraint=Constraint(regex="a+")))
    assert SamplingParams().constraint is None


@pytest.mark.parametrize(
    ("given", "field", "says"),
    [
        ({}, "constraint", "got none; give one of"),
        ({"regex": "a", "choice": ["b"]}, "constraint", "regex and choice"),
        ({"regexp": "a"}, "constraint", "'regex'"),
        ({"regex": ""}, "constraint.regex", "not empty"),
        ({"regex": 5}, "constraint.regex", "expected a text"),
        ({"regex": "\ud800"}, "constraint.regex", "surrogate"),
        ({"regex": "a" * (MOST_BYTES + 1)}, "constraint.regex", "allowed: up to"),
        ({"choice": "yes"}, "constraint.choice", "expected a list"),
        ({"choice": []}, "constraint.choice", "expected a list"),
        ({"choice": ["yes", 1]}, "constraint.choice", "expected a text"),
        ({"choice": ["é" * 20_000, "a" * 30_000]}, "constraint.choice", "allowed: up to"),
        ({"json_schema": False}, "constraint.json_schema", "got False"),
        ({"json_schema": "{"}, "constraint.json_schema", "no JSON"),
        ({"json_schema": "[1]"}, "constraint.json_schema", "expected a schema"),
        ({"json_schema": {"const": float("inf")}}, "constraint.json_schema", "no JSON"),
        ({"json_schema": {"const": {1, 2}}}, "constraint.json_schema", "no JSON"),
        ({"grammar": 3}, "constraint.grammar", "expected a text"),
    ],
)
def test_what_is_none_is_refused_by_field(given: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams.from_mapping({"constraint": given})
    assert caught.value.field == field
    assert says in str(caught.value)


@pytest.mark.parametrize("given", ["a+", 5, ["regex"]])
def test_what_is_no_mapping_is_refused(given: object) -> None:
    with pytest.raises(RequestError, match="constraint: expected a Constraint or a mapping"):
        SamplingParams.from_mapping({"constraint": given})


def test_a_constraint_can_be_written_as_json() -> None:
    assert Constraint.from_json('{"choice": ["a", "b"]}') == Constraint(choice=("a", "b"))
    for text in ("{", "[1]", "[" * 100_000):
        with pytest.raises(RequestError, match="constraint: "):
            Constraint.from_json(text)
