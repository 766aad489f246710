"""`qwenkit figures`: what was published about a model, each number with its source."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from itertools import groupby
from typing import Annotated, Any

import typer

from qwenkit.cli import console
from qwenkit.errors import UsageError, suggest
from qwenkit.survey.figures import (
    TOPICS,
    Contradiction,
    Figure,
    Setting,
    check_topic,
    figures_of,
    model_name,
    published,
)

_WORDS = {  # how a setting is said; {} is its value
    "weights": "{}",
    "context": "context {}",
    "generated": "{} generated",
    "length": "length {}",
    "shots": "{}-shot",
    "split": "{} set",
    "batch": "batch {}",
    "prompts": "{} prompts",
    "cache": "cache in {}",
    "machine": "{}",
    "software": "{}",
    "options": "{}",
    "method": "{}",
    "extension": "extension: {}",
    "text": "{} text",
    "decoding": "{} decoding",
    "accumulation": "{} accumulated",
    "servers": "{} servers",
}

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A model's name, also with an organisation, as a path or of a quantized form. "
        "[default: list the models]",
        show_default=False,
    ),
]


def command(
    model: Model = None,
    topic: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Only this, repeatable: {', '.join(TOPICS)}. [default: all]",
            show_default=False,
        ),
    ] = None,
    contradictions: Annotated[
        bool,
        typer.Option("--contradictions", help="List where the sources contradict each other."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object.")] = False,
) -> None:
    """Say what was published about a model: quality, speed, memory, with source and date.

    Nothing is measured and nothing downloaded: these are the numbers of the model cards, READMEs
    and benchmarks of their makers. Figures of a model include those of its quantized forms. Where
    two sources disagree both are shown, and what settles it.

    \b
    Examples:
      qwenkit figures
      qwenkit figures Qwen/Qwen2-7B-Instruct --topic speed
      qwenkit figures Qwen-7B-Chat-Int4 --json
      qwenkit figures --contradictions
    """
    topics = tuple(dict.fromkeys(check_topic(name) for name in topic or TOPICS))
    if contradictions:
        _say_contradictions(published().contradictions, as_json=as_json)
    elif model is None:
        _say_models(topics, as_json=as_json)
    else:
        _say_figures(model, topics, as_json=as_json)


def _say_figures(model: str, topics: tuple[str, ...], *, as_json: bool) -> None:
    figures = figures_of(model, topics=topics)
    if not figures:
        known = [name.partition(" (")[0] for name in published().models]
        name = model_name(model)
        kind = "" if name not in known else f" about {', '.join(topics)}"
        hint = suggest(name, known) if not kind else "Leave out --topic for the rest."
        raise UsageError(f"MODEL: nothing{kind} is known to be published of {name!r}. {hint}")
    if as_json:
        console.say_json({"model": model, "figures": [as_dictionary(f) for f in figures]})
        return
    for line in lines(figures):
        console.say(line)
    for entry in published().contradictions:
        if any(side in figures for side in entry.sides):
            console.say(f"\nContradiction {entry.number}: {entry.about} {entry.settled}")


def lines(figures: list[Figure]) -> list[str]:
    """The figures as people read them, a paragraph for each table and model."""
    found = []
    for (_, model), part in groupby(figures, key=lambda f: (f.table, f.model)):
        group = list(part)
        first = group[0]
        common = dict(first.setting)
        for figure in group:
            common = {k: v for k, v in common.items() if figure.setting.get(k) == v}
        told = described(common)
        found.append(f"{model}: {first.title}" + (f" ({told})" if told else ""))
        for own, row in groupby(group, key=lambda f: _own(f, common)):
            values = ", ".join(_value(figure) for figure in row)
            found.append(f"  {own}: {values}" if own else f"  {values}")
        found.append(f"  {first.source.title}, {first.source.date}: {first.source.address}")
    return found


def beside(name: str, *topics: str) -> list[str]:
    """What was published about a model or, where that is nothing, about its chat model, to be shown
    beside what was measured; empty if nothing.
    """
    plain = model_name(name)
    for each in (plain, f"{plain}-Instruct", f"{plain}-Chat"):
        figures = figures_of(each, topics=topics)
        if figures:
            return ["Published, on other machines:", *lines(figures)]
    return []


def say_beside(name: str, *topics: str) -> None:
    """Say what `beside` knows."""
    for line in beside(name, *topics):
        console.say(line)


def _own(figure: Figure, common: Mapping[str, object]) -> str:
    return described({k: v for k, v in figure.row_setting.items() if k not in common})


def described(setting: Setting) -> str:
    """A setting in words."""
    return ", ".join(_said(key, value) for key, value in setting.items())


def _said(key: str, value: str | int | bool) -> str:
    if isinstance(value, bool):
        words = key.replace("_", " ")
        return words if value else f"no {words}"
    return _WORDS[key].format(f"{value:,}" if isinstance(value, int) else value)


def _value(figure: Figure) -> str:
    if figure.value is None:
        return f"{figure.quantity} out of memory"
    unit = "" if figure.unit in figure.quantity else f" {figure.unit}"
    number = f"{figure.value:,}"
    return f"{figure.quantity} {number}{unit.replace(' %', '%')}"


def _say_models(topics: tuple[str, ...], *, as_json: bool) -> None:
    counts: dict[str, Counter[str]] = {}
    for figure in published().figures:
        if figure.topic in topics:
            counts.setdefault(figure.model, Counter())[figure.topic] += 1
    if as_json:
        console.say_json({"models": {name: dict(count) for name, count in counts.items()}})
        return
    for name, count in sorted(counts.items()):
        console.say(f"{name}: {', '.join(f'{n} {kind}' for kind, n in count.items())}")


def _say_contradictions(entries: tuple[Contradiction, ...], *, as_json: bool) -> None:
    if as_json:
        told = [
            {
                "number": entry.number,
                "about": entry.about,
                "settled": entry.settled,
                "sides": [as_dictionary(side) for side in entry.sides],
            }
            for entry in entries
        ]
        console.say_json({"contradictions": told})
        return
    for entry in entries:
        console.say(f"{entry.number}. {entry.about} {entry.settled}")
        for side in entry.sides:
            own = described(side.row_setting)
            where = f"{side.source.title}, {side.source.date}"
            console.say(f"   {side.model}{f', {own}' if own else ''}: {_value(side)} ({where})")


def as_dictionary(figure: Figure) -> dict[str, Any]:
    """A figure as JSON-ready data."""
    values = dataclasses.asdict(figure)
    del values["row_setting"]
    values["source"]["date"] = figure.source.date.isoformat()
    return values
