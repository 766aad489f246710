"""Seventy constraints that mean harm: (name, the one field of a `types.constraint.Constraint`)."""

from __future__ import annotations

import json
from typing import Any


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def chain(count: int, link: str) -> dict[str, Any]:
    """Definitions that lead from one to the next; LINK is where the next one's name goes."""
    parts = {f"d{i}": json.loads(link.replace("LINK", f"#/$defs/d{i + 1}")) for i in range(count)}
    return {"$defs": {**parts, f"d{count}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def rules(count: int, body: str, name: str = "r") -> str:
    """Rules that lead from one to the next."""
    lines = (f"{name}{i}: {body.replace('NEXT', f'{name}{i + 1}')}" for i in range(count))
    return "\n".join((f"start: {name}0", *lines, f'{name}{count}: "z"'))


NESTED = "((a{1,500}){1,500}){1,500}"
REF = '{"$ref": "LINK"}'
IN_ARRAY = '{"type": "array", "items": {"$ref": "LINK"}}'
REGEXES = {
    "nested plus": "(a+)+b",
    "nested repetition": NESTED,
    "deeper repetition": "(((a{1,1000}){1,1000}){1,1000}){1,1000}",
    "repetition of a million": "a{1000000}",
    "repetition of thirty thousand": "a{30000}",
    "repetition beyond counting": "a{1,4000000000}",
    "dots repeated": "(.{1,1000}x){1,1000}",
    "dots before": ".*a.{200}b",
    "a table of 2^25 states": "(a|b)*a(a|b){25}c",
    "unclosed": "(",
    "ten thousand brackets": "(" * 10_000 + "a" + ")" * 10_000,
    "stars in stars": "(" * 200 + "a*" + ")*" * 200,
    "seven thousand words": "|".join(f"w{i}x" for i in range(7_000)),
    "one long word": "ab" * 32_000,
    "too long": "a" * 1_000_000,
    "optional five thousand": "(a?){5000}a{5000}",
    "any letters": r"\w{1,5000}",
    "classes": r"[\p{L}\p{N}]{1,50}" * 50,
    "one large class": "[" + "".join(chr(0x100 + 2 * i) for i in range(20_000)) + "]{1,100}",
    "nothing matches": r"[^\x00-\x{10FFFF}]",
    "looks ahead": "(?=(a{500}){500})a",
    "refers back": r"(a)\1",
    "half a surrogate": "\ud800",
}
SCHEMAS: dict[str, Any] = {
    "nested 10,000": deep(10_000),
    "nested 900": deep(900),
    "text nested 200,000": '{"items":' * 200_000 + "{}" + "}" * 200_000,
    "brackets 30,000": "[" * 30_000 + "]" * 30_000,
    "itself": {"$ref": "#"},
    "a loop": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "a chain": chain(1_500, REF),
    "a chain of arrays": chain(900, IN_ARRAY),
    "doubling": chain(60, '{"anyOf": [{"$ref": "LINK"}, {"$ref": "LINK"}]}'),
    "doubling of all": chain(60, '{"allOf": [{"$ref": "LINK"}, {"$ref": "LINK"}]}'),
    "a remote reference": {"$ref": "http://127.0.0.1:9/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "an unknown type": {"type": "bogus"},
    "a bad pattern": {"type": "string", "pattern": "("},
    "a nested pattern": {"type": "string", "pattern": NESTED},
    "patterns against each other": {
        "type": "string",
        "allOf": [{"oneOf": [{"pattern": f"{j}.*{i}"} for j in range(5)]} for i in range(8)],
    },
    "properties against each other": {
        "allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {}}} for j in range(6)]} for i in range(8)]
    },
    "a million items": {"type": "array", "items": {}, "minItems": 1_000_000},
    "10^18 characters": {"type": "string", "minLength": 10**18},
    "a range of 10^300": {"type": "integer", "minimum": -(10**30), "maximum": 10**300},
    "multiples of a prime": {"type": "integer", "multipleOf": 999_999_937},
    "four thousand values": {"enum": [f"value{i}" for i in range(4_500)]},
    "a thousand optional": {
        "type": "object",
        "properties": {f"property{i}": {} for i in range(1_500)},
    },
    "one long value": {"const": "word " * 13_000},
    "spaces of its own": {"x-guidance": {"whitespace_pattern": NESTED}, "type": "object"},
    "contradiction": {"type": "string", "minLength": 5, "maxLength": 2},
    "not a number": {"const": float("nan")},
}
GRAMMARS = {
    "another language": "root ::= root",
    "itself": "start: start",
    "left recursion": 'start: start "a" | "a"',
    "two rules": "start: a\na: b\nb: a",
    "ambiguous": 'start: s s s s s s\ns: s s s | "a" | s s | ',
    "a chain of rules": rules(1_500, '"a" NEXT'),
    "a chain of terminals": rules(1_900, '("a" NEXT)*', "R"),
    "a hundred thousand rules": rules(100_000, '"a" NEXT'),
    "doubling": rules(60, "NEXT NEXT"),
    "doubling terminals": rules(40, "NEXT NEXT", "R"),
    "repetition": 'start: a{1,500}\na: b{1,500}\nb: c{1,500}\nc: "a"',
    "two thousand optional": f'start: {"a? " * 2_000}\na: "x"',
    "brackets": f'start: {"(" * 10_000}"a"{")" * 10_000}',
    "a control token": 'start: <|im_end|> "a"',
    "an id that controls": 'start: <[151643]> "a"',
    "a schema inside": 'start: %json {"type": "array", "maxItems": 100000000, "items": {}}',
}
CHOICES: dict[str, Any] = {
    "none": [],
    "an empty one": [""],
    "a hundred thousand": [f"choice {i}" for i in range(100_000)],
    "all alike": ["a"] * 10_000,
    "beginnings": ["a" * i for i in range(1, 350)],
}
CASES: list[tuple[str, dict[str, Any]]] = [
    (f"{field}: {name}", {field: value})
    for field, cases in (
        ("regex", REGEXES),
        ("json_schema", SCHEMAS),
        ("grammar", GRAMMARS),
        ("choice", CHOICES),
    )
    for name, value in cases.items()
]
