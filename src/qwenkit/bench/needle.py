"""Needle in a haystack: how much of a context a model finds things in, by length and by depth.

Sentences with new numbers are hidden in a long text and asked for in one chat turn (the test of the
announcement of Qwen2, with the whole sequence counted). Prompts are rendered by the model's own
template and run through the engine, greedily. Every cell is written down when it is done, so that
an interrupted measurement goes on where it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qwenkit.bench.methods import check_methods
from qwenkit.bench.needle_text import Hunt, exact_prompt, score
from qwenkit.bench.plot import heat_svg
from qwenkit.bench.recorded import read_cells, write_files
from qwenkit.errors import UsageError

ANSWER_TOKENS = 32  # room for the answer, for each needle
_CONDITIONS = ("model", "compute", "haystack", "question", "needles", "answers", "answer_tokens")
Progress = Callable[[str, float], None]


class Reader(Protocol):
    """A chat model that is asked about a text."""

    def render(self, message: str) -> Sequence[int]:
        """The ids of a prompt with one user's message."""

    def answer(
        self, ids: Sequence[int], *, max_tokens: int, progress: Callable[[float], None]
    ) -> tuple[str, str]:
        """The reply to a prompt, and how the context was extended for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleSettings:
    """`ropes` are tables, `lengths` columns in tokens of prompt and answer together, `depths` rows
    in percent of the haystack. Raises UsageError naming the setting on construction.
    """

    ropes: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[int, ...]

    def __post_init__(self) -> None:
        check_methods("rope", self.ropes)
        if not self.lengths or min(self.lengths) < 1:
            raise UsageError(f"length: expected numbers of at least 1, got {self.lengths}.")
        if not self.depths or not all(0 <= depth <= 100 for depth in self.depths):
            raise UsageError(f"depth: expected percentages, 0 to 100, got {self.depths}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One question asked. `score` is the share of `answers` that are in the `reply`."""

    score: float
    answers: tuple[str, ...]
    reply: str
    prompt_tokens: int
    extension: str


Grid = dict[int, dict[int, Cell]]  # length → depth → cell


@dataclass(slots=True, kw_only=True)
class NeedleTable:
    """What was found; `cells` maps rope, length and depth. The other fields are its conditions;
    `digests` tell "model" and "haystack" from others of the same name.
    """

    model: str
    compute: str
    haystack: str
    question: str
    needles: tuple[str, ...]
    answers: tuple[str, ...]
    answer_tokens: int
    command: str = ""
    digests: dict[str, str] = field(default_factory=dict)
    cells: dict[str, Grid] = field(default_factory=dict)

    def grid(self, rope: str) -> dict[int, dict[int, float]]:
        """The scores of one rope: length → depth → 0.0 to 1.0, both ascending."""
        return {
            length: {depth: row[depth].score for depth in sorted(row)}
            for length, row in sorted(self.cells[rope].items())
        }

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return dataclasses.asdict(self)

    def to_markdown(self) -> str:
        """A table for each rope, their conditions above them."""
        lines = [
            f"{len(self.needles)} needle(s) in {self.haystack}: the share that {self.model} found, "
            f"by length in tokens and by depth; `{self.command}`."
        ]
        for rope in self.cells:
            grid = self.grid(rope)
            depths = sorted({depth for row in grid.values() for depth in row})
            lines += [
                "",
                f"| {rope} | " + " | ".join(f"{length:,}" for length in grid) + " |",
                "| --- |" + " ---: |" * len(grid),
            ]
            for depth in depths:
                values = (row.get(depth) for row in grid.values())
                cells = ("–" if value is None else f"{value:.2f}" for value in values)
                lines.append(f"| {depth} % | " + " | ".join(cells) + " |")
            means = (sum(row.values()) / len(row) for row in grid.values())
            lines.append("| mean | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
        return "\n".join(lines) + "\n"


def read_table(path: Path, fresh: NeedleTable) -> NeedleTable:
    """What `path` holds of the same measurement, or `fresh` where there is no such file.

    Raises UsageError for a file of another measurement, or one that cannot be read.
    """
    conditions = {key: getattr(fresh, key) for key in _CONDITIONS}
    cells = read_cells(path, conditions, fresh.digests, _grids)
    return fresh if cells is None else dataclasses.replace(fresh, cells=cells)


def _grids(data: Mapping[str, Any]) -> dict[str, Grid]:
    return {
        rope: {
            int(length): {int(depth): _cell(cell) for depth, cell in row.items()}
            for length, row in grid.items()
        }
        for rope, grid in data.items()
    }


def _cell(data: Mapping[str, Any]) -> Cell:
    return Cell(
        score=float(data["score"]),
        answers=tuple(data["answers"]),
        reply=str(data["reply"]),
        prompt_tokens=int(data["prompt_tokens"]),
        extension=str(data["extension"]),
    )


def write_table(folder: Path, table: NeedleTable) -> None:
    """needle.json, needle.md and needle.svg in `folder`."""
    write_files(
        folder,
        "needle",
        data=table.to_json(),
        markdown=table.to_markdown(),
        picture=heat_svg(
            f"{table.model}: {len(table.needles)} needle(s) in {table.haystack}",
            "tokens",
            "depth, %",
            {rope: table.grid(rope) for rope in table.cells},
        ),
    )


def measure_needle(
    reader: Callable[[str, int], Reader],
    hunt: Hunt,
    settings: NeedleSettings,
    table: NeedleTable,
    *,
    save: Callable[[NeedleTable], None],
    progress: Progress | None = None,
) -> NeedleTable:
    """Fill the cells of `table` that are missing; `save` is called after every cell.

    `reader` makes a model for a rope and for sequences up to so many tokens. Raises UsageError for
    a length that is too short for question and needles, or beyond what a rope allows.
    """
    missing = [
        (rope, length, depth)
        for rope in settings.ropes
        for length in settings.lengths
        for depth in settings.depths
        if depth not in table.cells.get(rope, {}).get(length, {})
    ]
    total, done = sum(length for _, length, _ in missing), 0
    opened: tuple[str, Reader] | None = None
    for rope, length, depth in missing:
        if opened is None or opened[0] != rope:
            opened = rope, reader(rope, max(settings.lengths))

        def show(
            share: float,
            done: int = done,
            what: str = f"{rope} {length:,} at {depth} %",
            length: int = length,
        ) -> None:
            if progress is not None:
                progress(what, (done + share * length) / total)

        cell = _ask(opened[1], hunt, table, length=length, depth=depth, progress=show)
        table.cells.setdefault(rope, {}).setdefault(length, {})[depth] = cell
        done += length
        save(table)
    return table


def _ask(
    reader: Reader,
    hunt: Hunt,
    table: NeedleTable,
    *,
    length: int,
    depth: int,
    progress: Callable[[float], None],
) -> Cell:
    progress(0.0)
    room = table.answer_tokens
    ids, needles = exact_prompt(
        hunt, depth=depth, tokens=length - room, render=reader.render, key=f"{length}/{depth}"
    )
    reply, extension = reader.answer(ids, max_tokens=room, progress=progress)
    return Cell(
        score=score(reply, needles),
        answers=tuple(needle.answer for needle in needles),
        reply=reply,
        prompt_tokens=len(ids),
        extension=extension,
    )
