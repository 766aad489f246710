"""Constraints as the texts that are compiled, and what is refused before: nesting without end.

The compiler calls itself for every level, and what it can be given has levels behind references
too: a rule's or a definition's may stand below one another. So the levels of all of them are
counted together. Knows no tensor and no compiler.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qwenkit.errors import RequestError
from qwenkit.types.constraint import Constraint

MOST_LEVELS = 2_000  # measured: one takes up to 5 kB of the compiling thread's stack
_SCHEMA_BEGIN = "%json"
_DEEPEST_SCHEMA = 100  # of JSON in JSON; the compiler's own reader stops a little later


def check_levels(constraint: Constraint) -> None:
    """Raise RequestError for a schema or grammar that nests deeper than the compiler's stack."""
    levels, remedy = 0, "Write fewer rules and brackets."
    if constraint.grammar is not None:
        levels = grammar_levels(constraint.grammar)
    elif constraint.json_schema is not None:
        levels, remedy = schema_levels(json.loads(constraint.json_schema)), "Nest less deep."
    if levels > MOST_LEVELS:
        raise RequestError(
            f"constraint.{constraint.kind}",
            f"its levels may add up to {levels:,}; allowed: {MOST_LEVELS:,}. {remedy}",
        )


def grammar_levels(grammar: str) -> int:
    """Most levels that a grammar's rules and brackets, and the schemas in it, can make."""
    levels = at = 0
    while (found := grammar.find(_SCHEMA_BEGIN, at)) >= 0:
        begin = grammar.find("{", found)
        if begin < 0 or grammar[found + len(_SCHEMA_BEGIN) : begin].strip():
            begin = found + len(_SCHEMA_BEGIN)
            levels += _signs(grammar[at:begin])
            at = begin
            continue
        try:
            schema, end = json.JSONDecoder().raw_decode(grammar, begin)
            levels += _signs(grammar[at:begin]) + schema_levels(schema)
        except (ValueError, RecursionError):
            break
        at = end
    return levels + _signs(grammar[at:])


def _signs(text: str) -> int:
    return sum(text.count(sign) for sign in "([{:")


def schema_levels(schema: Any) -> int:
    """Most levels that objects and lists of a schema can stand below one another, references
    followed: its own, and those of every part that is referred to.

    Raises RequestError where they stand too deep in one another without any reference.
    """
    depths, references = _depths(schema)
    if depths[id(schema)] > _DEEPEST_SCHEMA:
        raise RequestError(
            "constraint.json_schema",
            f"is {depths[id(schema)]} levels deep; allowed: {_DEEPEST_SCHEMA}. Nest less deep.",
        )
    found = {reference: _part(schema, reference) for reference in sorted(references)}
    return depths[id(schema)] + sum(depths.get(id(part), 0) for part in found.values())


def _depths(schema: Any) -> tuple[dict[int, int], set[str]]:
    """How deep each object or list of a schema is, by its id(), and all texts of "$ref"."""
    order, references = [schema], set()
    for part in order:  # grows while it is read: parents first
        order += _children(part)
        if isinstance(part, dict) and isinstance(part.get("$ref"), str):
            references.add(part["$ref"])
    depths: dict[int, int] = {}
    for part in reversed(order):
        depths[id(part)] = 1 + max((depths[id(child)] for child in _children(part)), default=0)
    return depths, references


def _children(part: Any) -> Iterator[Any]:
    values = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return (value for value in values if isinstance(value, dict | list))


def _part(schema: Any, reference: str) -> Any:
    """What a reference points at; the whole schema where that is not known."""
    if not reference.startswith("#/"):
        return schema
    part = schema
    for name in reference[2:].split("/"):
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(part, dict) and name in part:
            part = part[name]
        elif isinstance(part, list) and name.isdecimal() and int(name) < len(part):
            part = part[int(name)]
        else:
            return schema
    return part


def choice_regex(texts: tuple[str, ...]) -> str:
    """A regular expression that matches each of `texts` and nothing else."""
    return "|".join("".join(map(_literal, text)) for text in texts)


def _literal(character: str) -> str:
    plain = character.isascii() and character.isalnum()
    return character if plain else f"\\x{{{ord(character):X}}}"
