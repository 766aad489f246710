"""What was published about the models: quality, speed and memory, each number with its source.

The numbers are data, `published_figures.json` beside this file: tables as they were published, each
with the source and the day of it. Where sources contradict each other both numbers are there, and
an entry says so; `clashes` finds contradictions, so that none goes unnoticed. Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib import resources
from typing import Any, cast

from qwenkit.errors import ConfigError, UsageError, suggest

TOPICS = ("quality", "speed", "memory", "perplexity", "size", "training", "tools")
_FILE = "published_figures.json"
_TABLE_KEYS = {"name", "topic", "source", "title", "setting", "columns", "rows"}
_COLUMN_KEYS = {"setting", "topic"}
_OUT_OF_MEMORY = "OOM"

Setting = Mapping[str, str | int | bool]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a number was published, and on which day."""

    name: str
    title: str
    date: date
    address: str


@dataclass(frozen=True, slots=True)
class Figure:
    """One published number. `value` is None where it ran out of memory.

    `setting` is all that was said of how it was measured; `row_setting` the part of it that tells
    the rows of its table apart.
    """

    table: str
    title: str
    topic: str
    source: Source
    model: str
    quantity: str
    unit: str
    value: float | None
    setting: Setting
    row_setting: Setting


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Numbers or statements that cannot all be right, and what settles it. `sides` are the figures
    that disagree; none where what disagrees are no numbers.
    """

    number: int
    about: str
    settled: str
    sides: tuple[Figure, ...]


@dataclass(frozen=True, slots=True)
class Published:
    """All of it."""

    figures: tuple[Figure, ...]
    contradictions: tuple[Contradiction, ...]

    @property
    def models(self) -> list[str]:
        """Every model that has a figure."""
        return list(dict.fromkeys(figure.model for figure in self.figures))


@cache
def published() -> Published:
    """The figures that come with the package."""
    text = resources.files("qwenkit.survey").joinpath(_FILE).read_text(encoding="utf-8")
    return read_published(json.loads(text))


def figures_of(name: str, *, topics: Iterable[str] = TOPICS) -> list[Figure]:
    """The figures of a model by a name as users have it: "Qwen/Qwen2-7B-Instruct-GPTQ-Int4", the
    path of a folder or a file. Those of a model are also those of its quantized forms.
    """
    wanted, known = model_name(name).lower(), set(topics)
    return [
        figure
        for figure in published().figures
        if figure.topic in known and figure.model.lower().partition(" (")[0] == wanted
    ]


def model_name(given: str) -> str:
    """The published name in a hub's name, a folder or a file: no organisation, no ending, nothing
    about quantization.
    """
    last = given.replace("\\", "/").rstrip("/").rpartition("/")[2].partition(":")[0]
    last = re.sub(r"\.gguf$", "", last, flags=re.IGNORECASE)
    return re.sub(_QUANTIZATION, "", last, flags=re.IGNORECASE)


_QUANTIZATION = (
    r"[-._](gptq|awq|gguf|int4|int8|nf4|fp8|bf16|f16|fp16|f32|i?q\d(_[a-z0-9]+)*)([-._].*)?$"
)


def check_topic(topic: str) -> str:
    """Raises UsageError for none of `TOPICS`."""
    if topic not in TOPICS:
        raise UsageError(f"topic: got {topic!r}. {suggest(topic, TOPICS)}")
    return topic


def clashes(figures: Sequence[Figure]) -> list[tuple[Figure, ...]]:
    """Figures of the same model, quantity and setting, from different tables, with different
    values.
    """
    groups: dict[object, list[Figure]] = {}
    for figure in figures:
        key = (figure.model, figure.quantity, figure.unit, tuple(sorted(figure.setting.items())))
        groups.setdefault(key, []).append(figure)
    return [
        tuple(group)
        for group in groups.values()
        if len({figure.table for figure in group}) > 1
        and len({figure.value for figure in group}) > 1
    ]


def read_published(content: Mapping[str, Any]) -> Published:
    """Figures from data in the layout of the file. Raises ConfigError naming the table and the row
    that cannot be used: an unknown key, source or topic, a day that is none, a row of another
    length, a number that is none, a row that is there twice, a side of a contradiction that is no
    figure.
    """
    _only(content, {"sources", "tables", "contradictions"}, "the file")
    sources = {name: _source(name, entry) for name, entry in content["sources"].items()}
    figures: list[Figure] = []
    for table in content["tables"]:
        figures += _figures(table, sources)
    names = [table["name"] for table in content["tables"]]
    if len(set(names)) < len(names):
        raise ConfigError("tables: a name is there twice.")
    contradictions = tuple(_contradiction(entry, figures) for entry in content["contradictions"])
    return Published(tuple(figures), contradictions)


def _only(entry: Mapping[str, Any], keys: set[str], where: str) -> None:
    if set(entry) != keys:
        wrong = ", ".join(sorted(set(entry) ^ keys))
        raise ConfigError(f"{where}: {wrong}: unknown or missing; expected {sorted(keys)}.")


def _source(name: str, entry: Mapping[str, Any]) -> Source:
    _only(entry, {"title", "date", "address"}, f"source {name}")
    try:
        day = date.fromisoformat(entry["date"])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"source {name}: date: got {entry['date']!r}; expected a day.") from error
    return Source(name, entry["title"], day, entry["address"])


def _figures(table: Mapping[str, Any], sources: Mapping[str, Source]) -> list[Figure]:
    where = f"table {table.get('name')!r}"
    _only(table, _TABLE_KEYS, where)
    if table["source"] not in sources:
        told = suggest(table["source"], sources)
        raise ConfigError(f"{where}: source: got {table['source']!r}. {told}")
    columns = table["columns"]
    for column in columns:
        _only(column, {"quantity", "unit"} | (set(column) & _COLUMN_KEYS), f"{where}, columns")
        topic = column.get("topic", table["topic"])
        if topic not in TOPICS:
            raise ConfigError(f"{where}: topic: got {topic!r}. {suggest(topic, TOPICS)}")
    figures, seen = [], set()
    for model, own, *values in table["rows"]:
        row = f"{where}, {model}, {own}"
        key = (model, tuple(sorted(own.items())))
        if len(values) != len(columns) or key in seen:
            reason = "is there twice" if key in seen else f"has {len(values)} values"
            raise ConfigError(f"{row}: {reason}; there are {len(columns)} columns.")
        seen.add(key)
        for column, value in zip(columns, values, strict=True):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                if value != _OUT_OF_MEMORY:
                    raise ConfigError(f"{row}: got {value!r}; expected a number.")
                value = None
            setting = {**table["setting"], **column.get("setting", {}), **own}
            figures.append(
                Figure(
                    table=table["name"],
                    title=table["title"],
                    topic=column.get("topic", table["topic"]),
                    source=sources[table["source"]],
                    model=model,
                    quantity=column["quantity"],
                    unit=column["unit"],
                    value=value,
                    setting=setting,
                    row_setting=own | column.get("setting", {}),
                )
            )
    return figures


def _contradiction(entry: Mapping[str, Any], figures: Sequence[Figure]) -> Contradiction:
    where = f"contradiction {entry.get('number')}"
    _only(entry, {"number", "about", "settled", "sides"}, where)
    sides = []
    for side in entry["sides"]:
        wanted = cast(Mapping[str, Any], side.get("setting", {})).items()
        found = [
            figure
            for figure in figures
            if (figure.table, figure.model, figure.quantity)
            == (side["table"], side["model"], side["quantity"])
            and wanted <= figure.setting.items()
        ]
        if len(found) != 1:
            raise ConfigError(f"{where}: {side}: {len(found)} figures are meant; expected one.")
        sides += found
    return Contradiction(entry["number"], entry["about"], entry["settled"], tuple(sides))
