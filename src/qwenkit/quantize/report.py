"""The quality sheet: what a model lost beside its parent, for people and for programs, and whether
that is more than was allowed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenkit import __version__
from qwenkit.checkpoint.atomic import replacing
from qwenkit.errors import UsageError
from qwenkit.quantize.compare import Comparison, MatrixComparison
from qwenkit.quantize.layer import MatrixResult
from qwenkit.quantize.settings import WHOLE_ROW, QuantizeSettings

NAME = "quality"
FP16_LARGEST = 65504.0
WORST_SHOWN = 8
_PATH_SHOWN = 46
# An error is nobody's choice of numbers any more beyond these multiples of rounding's, or of what
# chance makes of it where few tokens were seen.
_SUSPECT_MATRIX, _SUSPECT_ROW = 2.0, 4.0
_SUSPECT_PLAIN = 0.5  # of plain numbers, relative to the outputs
_HARMLESS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """A result beyond one of these is refused: the rise of perplexity as a share of the parent's,
    and the mean KL to the parent in nats. Raises UsageError naming the limit on construction.
    """

    perplexity_rise: float = 0.5
    kl: float = 0.5

    def __post_init__(self) -> None:
        for limit in dataclasses.fields(self):
            value = getattr(self, limit.name)
            if not value > 0:
                raise UsageError(f"{limit.name}: got {value}; expected a number above 0.")


@dataclass(slots=True, kw_only=True)
class Sheet:
    """`method` and `settings` say how it was made, where that is known; `text` what it was judged
    by. `tokens_per_second` is that of writing, by the number of tokens before.
    """

    parent: str
    model: str
    comparison: Comparison
    text: str
    settings: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    limits: Limits = field(default_factory=Limits)
    seconds: float | None = None
    tokens_per_second: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity_rise(self) -> float | None:
        """As a share of the parent's."""
        before, after = self.comparison.parent_perplexity, self.comparison.own_perplexity
        return None if before is None or after is None else after / before - 1

    def suspects(self) -> list[tuple[MatrixComparison, str]]:
        """Matrices that no way of rounding explains, and why."""
        found = []
        for matrix in self.comparison.matrices:
            reason = _suspicion(matrix)
            if reason is not None:
                found.append((matrix, reason))
        for path, error, most in self.comparison.ends:
            if not error <= most:
                end = MatrixComparison(path, None, 0.0, error)
                found.append((end, f"its outputs are off by {error:.0%}"))
        return found

    def overflowing(self) -> list[tuple[str, float]]:
        """Modules whose outputs in the parent are more than fp16 has, and the largest of each."""
        largest = self.comparison.largest.items()
        return [(path, size) for path, size in largest if not size <= FP16_LARGEST]

    def worst(self) -> list[MatrixComparison]:
        """The matrices with the largest errors."""
        return sorted(self.comparison.matrices, key=_error_first)[:WORST_SHOWN]

    def refusals(self) -> list[str]:
        """Why the result is beyond what is allowed; empty where it is not."""
        reasons = [f"{matrix.path}: {why}" for matrix, why in self.suspects()]
        rise, kl = self.perplexity_rise, self.comparison.kl
        if rise is not None and not rise <= self.limits.perplexity_rise:
            reasons.append(
                f"perplexity rose by {rise:.1%}; at most {self.limits.perplexity_rise:.1%} is "
                "allowed"
            )
        if kl is not None and not kl <= self.limits.kl:
            reasons.append(f"KL to the parent is {kl:.3f}; at most {self.limits.kl:.3f} is allowed")
        return reasons

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is no number is null."""
        data = {
            "qwenkit": __version__,
            "parent": self.parent,
            "model": self.model,
            "settings": self.settings,
            "calibration": self.calibration,
            "text": self.text,
            "perplexity_rise": self.perplexity_rise,
            **dataclasses.asdict(self.comparison),
            "suspects": [[matrix.path, why] for matrix, why in self.suspects()],
            "overflowing_fp16": [list(pair) for pair in self.overflowing()],
            "limits": dataclasses.asdict(self.limits),
            "refusals": self.refusals(),
            "notes": self.notes,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }
        numbers: dict[str, Any] = _finite(data)
        return numbers

    def to_markdown(self) -> str:
        """The sheet as tables that fit a terminal of 80 columns."""
        lines = [f"# {self.model} beside {self.parent}", ""]
        if self.settings:
            said = (f"{k} {v}" for k, v in self.settings.items() if v not in (None, False, []))
            lines += [", ".join(said) + ".", ""]
        lines += _table(("", "parent", "model"), self._figures())
        lines += ["", f"Judged by {self.comparison.tokens:,} tokens: {self.text}.", ""]
        lines += ["Furthest from the parent: the error of a matrix's outputs, and what multiple"]
        lines += ["it is of what rounding to nearest makes.", ""]
        worst = []
        for each in self.worst():
            beside = "" if each.beside_rounding is None else f"{each.beside_rounding:.2f}"
            figures = f"{each.bits_per_weight:.2f}", f"{each.error:.2%}", beside
            worst.append((shortened(each.path), *figures))
        lines += _table(("matrix", "bits", "error", "× rounding"), worst)
        for title, remarks in (
            ("Beyond what is allowed", self.refusals()),
            ("Beyond the numbers of fp16 (65,504); serve in bf16 or fp32", self._overflows()),
            ("To be known", self.notes),
        ):
            if remarks:
                lines += ["", f"{title}:", "", *(f"- {remark}" for remark in remarks)]
        return "\n".join(lines) + "\n"

    def _figures(self) -> list[tuple[str, str, str]]:
        found = self.comparison
        rows = [("bytes", f"{found.parent_bytes:,}", f"{found.own_bytes:,}")]
        if found.bits_per_weight is not None:
            rows.append(("bits per quantized weight", "", f"{found.bits_per_weight:.2f}"))
        if found.parent_perplexity is not None and found.own_perplexity is not None:
            rise = self.perplexity_rise or 0.0
            after = f"{found.own_perplexity:.3f} ({rise:+.1%})"
            rows.append(("perplexity", f"{found.parent_perplexity:.3f}", after))
        if found.kl is not None and found.top1 is not None:
            rows.append(("KL to the parent, nats", "", f"{found.kl:.4f}"))
            rows.append(("same likeliest token", "", f"{found.top1:.1%}"))
        if found.drifts:
            rows.append(("drift of the last layer", "", f"{found.drifts[-1]:.1%}"))
        for label, speed in self.tokens_per_second.items():
            rows.append((f"tokens per second, {label}", "", f"{speed:.1f}"))
        return rows

    def _overflows(self) -> list[str]:
        return [f"{path}: {size:,.0f}" for path, size in self.overflowing()]


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A Markdown table that can be read as it stands: the first column left, the others right."""
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]
    rule = [f"{'-' * max(widths[0], 3)}", *(f"{'-' * (max(w, 4) - 1)}:" for w in widths[1:])]
    widths = [len(dashes) for dashes in rule]
    lines = [
        " | ".join(f"{c:<{w}}" if not i else f"{c:>{w}}" for i, (c, w) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in (titles, *rows))
    ]
    return [f"| {line} |" for line in (lines[0], " | ".join(rule), *lines[1:])]


def method_notes(results: Sequence[MatrixResult], settings: QuantizeSettings) -> list[str]:
    """What the user should know of how matrices were quantized."""
    notes, wanted = [], settings.wanted_group
    others = [r for r in results if r.group_size != wanted]
    if wanted is not None and wanted != WHOLE_ROW and others:
        if settings.is_awq_layout:
            size = others[0].group_size
            decides = next(r for r in results if r.columns % (2 * size))
            notes.append(
                f"groups of {size} instead of {wanted} in all matrices: AWQ's files have one group "
                f"size, and no larger one divides the {decides.columns} columns of {decides.path}"
            )
        else:
            sizes = ", ".join(str(size) for size in sorted({r.group_size for r in others}))
            notes.append(
                f"groups of {sizes} instead of {wanted}, which does not divide the width, in "
                f"{len(others)} matrices, such as {others[0].path}"
            )
    for result in results:
        if result.note:
            notes.append(f"{result.path}: {result.note}")
    return notes


def write_sheet(folder: Path, sheet: Sheet) -> None:
    """quality.json and quality.md in `folder`."""
    data = json.dumps(sheet.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for kind, content in (("json", data), ("md", sheet.to_markdown())):
        with replacing(folder / f"{NAME}.{kind}") as file:
            file.write(content.encode())


def shortened(path: str) -> str:
    """A module path that fits a column: the middle of a long one is left out."""
    if len(path) <= _PATH_SHOWN:
        return path
    return f"{path[: _PATH_SHOWN // 2 - 1]}…{path[-(_PATH_SHOWN // 2) :]}"


def _suspicion(matrix: MatrixComparison) -> str | None:
    if not math.isfinite(matrix.error):
        return "its outputs are not finite"
    if matrix.storage is None:
        if matrix.error > _SUSPECT_PLAIN:
            return f"its outputs are off by {matrix.error:.0%}"
        return None
    whole, row = matrix.beside_rounding, matrix.worst_row_beside
    limit = max(_SUSPECT_MATRIX, matrix.by_chance or 0)
    if whole is not None and whole > limit and matrix.error > _HARMLESS:
        return (
            f"its outputs are off by {matrix.error:.0%}, {whole:.1f} times what rounding to "
            "nearest makes"
        )
    if (
        row is not None
        and row > max(_SUSPECT_ROW, matrix.row_by_chance or 0)
        and matrix.error > _HARMLESS
    ):
        return f"its row {matrix.worst_row} is off {row:.1f} times as far as rounding makes it"
    return None


def _error_first(matrix: MatrixComparison) -> float:
    return -matrix.error if math.isfinite(matrix.error) else -math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
