"""The options of `qwenkit generate` that say what the output must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qwenkit.cli.main import app
from qwenkit.cli.settings import parse_setting
from qwenkit.errors import RequestError
from qwenkit.types.constraint import ANY_OBJECT, Constraint

runner = CliRunner()


def run(*args: str) -> Any:
    return runner.invoke(app, ["generate", "--prompt", "p", *args])


def test_each_kind_reaches_the_model(loaded: Any, model: Any, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "sum.lark"
    schema.write_text('{"type": "integer"}\n')
    grammar.write_text('start: "a"')
    cases = {
        ("--json-schema", str(schema)): Constraint(json_schema='{"type": "integer"}'),
        ("--json-schema", '{"type": "null"}'): Constraint(json_schema='{"type": "null"}'),
        ("--json-schema", "true"): Constraint(json_schema=ANY_OBJECT),
        ("--regex", "a+"): Constraint(regex="a+"),
        ("--choice", "yes", "--choice", "no"): Constraint(choice=("yes", "no")),
        ("--grammar", str(grammar)): Constraint(grammar='start: "a"'),
    }
    for words in cases:
        result = run(*words)
        assert result.exit_code == 0, result.stderr
    assert [used.constraint for used in model.used] == list(cases.values())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--regex", "a", "--choice", "b"), "Got --regex and --choice"),
        (("--json-schema", "{"), "constraint.json_schema: is no JSON"),
        (("--json-schema", "missing.json"), "--json-schema 'missing.json' cannot be read"),
        (("--grammar", "missing.lark"), "--grammar 'missing.lark' cannot be read"),
        (("--regex", ""), "constraint.regex"),
    ],
)
def test_what_is_no_constraint_is_refused_before_loading(
    words: tuple[str, ...], says: str, loaded: Any
) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert says in result.stderr
    assert loaded == []


def test_a_constraint_can_be_a_setting_of_a_chat() -> None:
    assert parse_setting("constraint", '{"choice": ["a"]}') == Constraint(choice=("a",))
    assert parse_setting("constraint", "none") is None
    with pytest.raises(RequestError, match="unknown kind of constraint"):
        parse_setting("constraint", '{"choices": ["a"]}')
