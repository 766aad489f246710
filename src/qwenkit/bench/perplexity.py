"""Perplexity by context length and by method of extension: what each method does beyond the length
that a model was trained for (the table of arXiv 2309.16609, section 2.3.2, on any text and model).

Each method computes whole windows through the paged cache, as serving does. Lengths for which a
method decides the same are prefixes of one pass. Every pass is written down when it is done, so
that an interrupted measurement goes on where it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwenkit.bench.forced import ForcedPass
from qwenkit.bench.methods import METHODS, check_methods, own_rotary, positioned
from qwenkit.bench.plot import lines_svg
from qwenkit.bench.recorded import read_cells, write_files
from qwenkit.errors import UsageError
from qwenkit.layers.position import Position, Rotary, choose_extension, extended
from qwenkit.load import Loaded
from qwenkit.score import perplexity, token_logprobs
from qwenkit.types.extension import Extension

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexitySettings:
    """`methods` are rows, `lengths` columns in tokens; `windows` pieces of the text are averaged.

    Raises UsageError naming the setting on construction.
    """

    methods: tuple[str, ...]
    lengths: tuple[int, ...]
    windows: int = 1

    def __post_init__(self) -> None:
        check_methods("method", self.methods)
        if not self.lengths or min(self.lengths) < 2:
            raise UsageError(f"length: expected numbers of at least 2, got {self.lengths}.")
        if self.windows < 1:
            raise UsageError(f"windows: expected at least 1, got {self.windows}.")


@dataclass(slots=True, kw_only=True)
class PerplexityTable:
    """`cells` maps method and length to the mean negative log-likelihood in nats per token;
    `digests` tell "model" and "text" from others of the same name.
    """

    model: str
    text: str
    trained_tokens: int
    windows: int
    command: str = ""
    digests: dict[str, str] = field(default_factory=dict)
    cells: dict[str, dict[int, float]] = field(default_factory=dict)

    def perplexity(self, method: str, length: int) -> float | None:
        """e to the mean of a cell; None while it is not measured."""
        mean = self.cells.get(method, {}).get(length)
        return None if mean is None else perplexity(-mean)

    @property
    def lengths(self) -> list[int]:
        """Every length that any method has, ascending."""
        return sorted({length for row in self.cells.values() for length in row})

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data: settings, and cells both as means and as perplexities."""
        perplexities = {
            method: {str(n): self.perplexity(method, n) for n in sorted(row)}
            for method, row in self.cells.items()
        }
        return dataclasses.asdict(self) | {"perplexity": perplexities}

    def to_markdown(self) -> str:
        """The table, its conditions above it."""
        lengths = self.lengths
        lines = [
            f"Perplexity of {self.model} (trained for {self.trained_tokens:,} tokens) on "
            f"{self.text}, {self.windows} window(s) of each length; `{self.command}`.",
            "",
            "| method | " + " | ".join(f"{n:,}" for n in lengths) + " |",
            "| --- |" + " ---: |" * len(lengths),
        ]
        for method in self.cells:
            values = (self.perplexity(method, n) for n in lengths)
            cells = ("–" if v is None else f"{v:.2f}" if v < 1e4 else f"{v:.1e}" for v in values)
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def read_table(path: Path, fresh: PerplexityTable) -> PerplexityTable:
    """What `path` holds of the same measurement, or `fresh` where there is no such file.

    Raises UsageError for a file of another measurement, or one that cannot be read.
    """
    conditions = {k: getattr(fresh, k) for k in ("model", "text", "trained_tokens", "windows")}
    cells = read_cells(path, conditions, fresh.digests, _cells)
    return fresh if cells is None else dataclasses.replace(fresh, cells=cells)


def _cells(data: Any) -> dict[str, dict[int, float]]:
    return {m: {int(n): float(v) for n, v in row.items()} for m, row in data.items()}


def write_table(folder: Path, table: PerplexityTable) -> None:
    """perplexity.json, perplexity.md and perplexity.svg in `folder`."""
    rows = {
        method: {n: p for n in row if (p := table.perplexity(method, n)) is not None}
        for method, row in table.cells.items()
    }
    write_files(
        folder,
        "perplexity",
        data=table.to_json(),
        markdown=table.to_markdown(),
        picture=lines_svg(f"{table.model} on {table.text}", "tokens", "perplexity", rows),
    )


def measure_perplexity(
    loaded: Loaded,
    ids: Sequence[int],
    settings: PerplexitySettings,
    table: PerplexityTable,
    *,
    save: Callable[[PerplexityTable], None],
    progress: Progress | None = None,
) -> PerplexityTable:
    """Fill the cells of `table` that are missing; `save` is called after every pass.

    Raises UsageError when the text is too short, or the model's positions are not rotary.
    """
    own, longest = own_rotary(loaded.config, loaded.record.name), max(settings.lengths)
    if len(ids) < longest * settings.windows:
        raise UsageError(
            f"text: has {len(ids)} tokens; {settings.windows} windows of {longest} need "
            f"{longest * settings.windows}. Give a longer text or shorter lengths."
        )
    jobs = [job for name in settings.methods for job in _passes(name, own, settings, table)]
    total = sum(max(job.lengths) for job in jobs) * settings.windows
    done = 0
    for job in jobs:
        sums = dict.fromkeys(job.lengths, 0.0)
        for window in range(settings.windows):
            first = window * (len(ids) // settings.windows)
            part = ids[first : first + max(job.lengths)]
            nlls: list[torch.Tensor] = []
            for piece in _losses(loaded, part, job):
                nlls.append(piece)
                done += len(piece)
                if progress is not None:
                    progress(f"{job.method} {max(job.lengths):,}", done / total)
            whole = torch.cat(nlls)  # [tokens - 1], fp64
            for length in job.lengths:
                sums[length] += whole[: length - 1].mean().item()
        row = table.cells.setdefault(job.method, {})
        row.update({length: value / settings.windows for length, value in sums.items()})
        save(table)
    return table


@dataclass(frozen=True, slots=True)
class _Pass:
    """One computation of a window: `lengths` are those for which `method` decides the same."""

    method: str
    position: Position
    extension: Extension
    lengths: tuple[int, ...]


def _passes(
    name: str, own: Rotary, settings: PerplexitySettings, table: PerplexityTable
) -> list[_Pass]:
    method, trained = METHODS[name], table.trained_tokens
    position = method.position(own, trained)
    decided: dict[object, tuple[Extension, list[int]]] = {}
    for length in sorted(settings.lengths):
        if length in table.cells.get(name, {}):
            continue
        extension = choose_extension(
            position,
            method.mode,
            trained_tokens=trained,
            prompt_tokens=length,
            total_tokens=length,
        )
        key = extended(position, extension) if isinstance(position, Rotary) else extension
        decided.setdefault(key, (extension, []))[1].append(length)
    return [_Pass(name, position, extension, tuple(n)) for extension, n in decided.values()]


def _losses(loaded: Loaded, ids: Sequence[int], job: _Pass) -> Iterator[torch.Tensor]:
    """Yields the negative log-likelihoods of the tokens after the first, fp64, piece by piece."""
    forced = ForcedPass(loaded, ids, job.extension)
    for start in forced.starts:
        with positioned(loaded.model, job.position):
            logits, targets = forced.piece(start)
        yield -token_logprobs(logits, targets)
