"""The options that say what an output must be, and their reading into a constraint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from qwenkit.cli.options import read_text_file
from qwenkit.errors import UsageError
from qwenkit.types.constraint import Constraint

JsonSchema = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|TEXT",
        help="The output is JSON of this schema: a file, the schema itself; true: any object.",
    ),
]
Regex = Annotated[
    str | None, typer.Option(metavar="REGEX", help="The whole output matches this expression.")
]
Choice = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="The output is one of these; given several times."),
]
Grammar = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The output is a sentence of this Lark grammar."),
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintOptions:
    """What the output of a command must be; see `qwenkit.cli.grouped`."""

    json_schema: JsonSchema = None
    regex: Regex = None
    choice: Choice = None
    grammar: Grammar = None

    def constraint(self) -> Constraint | None:
        """The constraint that was given. Raises UsageError for several, a file that cannot be read,
        or what is none.
        """
        given: dict[str, Any] = {
            "json_schema": None if self.json_schema is None else _schema(self.json_schema),
            "regex": self.regex,
            "choice": self.choice or None,
            "grammar": None if self.grammar is None else read_text_file("--grammar", self.grammar),
        }
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            names = " and ".join("--" + name.replace("_", "-") for name in given)
            raise UsageError(f"Got {names}; give one.")
        return Constraint.from_mapping(given) if given else None


def _schema(given: str) -> str | bool:
    text = given.strip()
    if text == "true":
        return True
    return text if text.startswith("{") else read_text_file("--json-schema", Path(given))
