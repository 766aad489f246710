"""A run of the board as a table and as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import qwenkit
from qwenkit.bench.reliability.spec import Result, Size, missing_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardReport:
    """What was run, where, and what came of it."""

    results: Sequence[Result]
    size: Size
    seed: int
    machine: str
    command: str
    seconds: float

    @property
    def holds(self) -> bool:
        """True when no row that could run broke a promise."""
        return all(result.holds for result in self.results if result.tally.unavailable is None)

    def to_json(self) -> dict[str, Any]:
        """Plain data for programs."""
        return {
            "bench": "reliability",
            "qwenkit": qwenkit.__version__,
            "machine": self.machine,
            "command": self.command,
            "size": self.size,
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "holds": self.holds,
            "rows": [result.to_json() for result in self.results],
            "not_here_yet": missing_rows(),
        }

    def to_markdown(self) -> str:
        """The table, with what each row promises, and what is missing."""
        lines = [
            f"`{self.command}`, {self.size} form, seed {self.seed}, "
            f"{self.seconds / 60:.1f} minutes. {self.machine}. Memory is what the server "
            "took beyond what it had at rest.",
            "",
            "| row | | kept | worst time | most memory | what it promises |",
            "| ---: | --- | ---: | ---: | ---: | --- |",
        ]
        for result in self.results:
            seconds, memory = (text.strip() for text in result.worst())
            row, kept = result.row, result.score()
            lines.append(
                f"| {row.id} | {row.name} | {kept} | {seconds} | {memory} | {row.promise} |"
            )
        lines += ["", *self._broken(), f"Not here yet: {_listed(missing_rows())}."]
        return "\n".join(lines) + "\n"

    def _broken(self) -> list[str]:
        lines = []
        for result in self.results:
            if result.tally.unavailable is not None:
                lines.append(f"Row {result.row.id}: {result.tally.unavailable}.")
            elif not result.holds:
                cases = dict.fromkeys(failure.case for failure in result.tally.failures)
                lines.append(f"Row {result.row.id} broke its promise: {'; '.join(cases)[:400]}.")
        return [*lines, ""] if lines else []


def _listed(rows: Mapping[int, str]) -> str:
    return ", ".join(f"{number} ({name})" for number, name in rows.items()) or "none"
