"""The tables that `qwenkit bench` prints for people; in a narrow terminal names fold, no figure is
cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from qwenkit.bench.ceilings import Ceilings
from qwenkit.bench.kernels import KernelReport, KernelResult
from qwenkit.bench.peers.spec import PROMPT_TOKENS, Work
from qwenkit.bench.report import EngineResult, SpeedReport
from qwenkit.bench.sources import OURS
from qwenkit.cli import console

_KERNEL_TITLES = ("what", "rows", "µs", "GB/s", "GOP/s", "of ceiling", "torch÷ours")


class ProgressBar:
    """A bar on standard error while a measurement runs; called with what and the share done."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("", total=1.0)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, what: str, share: float) -> None:
        self._progress.update(self._task, description=what, completed=share)

    def say(self, line: str) -> None:
        """A line on standard output, which stays while the bar goes on."""
        self._progress.stop()
        console.say(line)
        self._progress.start()


def show_speed(report: SpeedReport) -> None:
    """Tokens per second of each engine, our ratio in brackets, and what is to be said about it."""
    table = Table(
        title=f"{report.source.name}: tokens per second, median of {report.turns_each} turns",
        caption=f"In brackets: ours ÷ it. {report.machine}, {report.threads} threads.",
    )
    _fill(
        table,
        ("engine", *map(_title, report.plan), "peak MB"),
        [_row(report, engine) for engine in report.engines],
    )
    terminal = Console()
    terminal.print(table)
    for line in _remarks(report):
        terminal.print(line, style="yellow", markup=False)


def _fill(table: Table, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Put in rows of a name and figures, so that only names fold where there is little room."""
    name, *figures = titles
    table.add_column(name, overflow="fold")
    for index, title in enumerate(figures, 1):
        words = [*title.split(), *(word for row in rows for word in row[index].split())]
        table.add_column(title, justify="right", min_width=max(map(len, words)))
    for row in rows:
        table.add_row(*row)


def _title(work: Work) -> str:
    if work.measure == "prefill":
        return f"prefill {work.tokens}"
    if work.streams > 1:
        return f"{work.streams} streams"
    return "decode" if work.context == PROMPT_TOKENS else f"at {work.context}"


def _row(report: SpeedReport, engine: EngineResult) -> list[str]:
    cells = [f"{engine.engine} {engine.version or ''}\n{engine.setting}".strip()]
    for work in report.plan:
        median = engine.median(work.name)
        ratio = None if engine.engine == OURS else report.ratio(engine, work.name)
        cell = "–" if median is None else f"{median:.1f}"
        if report.void(engine, work.name):
            cell += "\nvoid"
        elif ratio is not None:
            cell += f"\n({ratio:.2f})"
        cells.append(cell)
    cells.append(f"{engine.peak_bytes / 1e6:.0f}" if engine.peak_bytes else "–")
    return cells


def _remarks(report: SpeedReport) -> list[str]:
    lines = []
    for engine in report.engines:
        if engine.error is not None:
            what = "was left out" if engine.version is None else "failed while it was measured"
            lines.append(f"{engine.engine} {what}: {engine.error}")
        for work in report.plan:
            known, best = report.expectation(engine, work.name), engine.best(work.name)
            if known is not None and best is not None and best < known.needed:
                lines.append(
                    f"{engine.engine}, {_title(work)}: void. Its best turn gave {best:.1f}; at "
                    f"least {known.needed:.1f} is known to be within its reach (the table's "
                    f"{known.table:g} × {known.scale:.2f} for this machine × 0.9)."
                )
    unsteady = report.unsteady_turns()
    if unsteady:
        lines.append(
            f"The machine itself moved by more than 10 % during {unsteady} of "
            f"{report.turn_count()} turns: trust the ratios more than the figures, and repeat."
        )
    return lines


def show_kernels(report: KernelReport) -> None:
    """A table for each op and model, and the ceilings that the shares are of."""
    terminal = Console()
    terminal.print(
        f"{report.machine}, {report.threads} threads, kernels: {report.variant}", markup=False
    )
    ceilings = report.ceilings
    if ceilings is None:
        terminal.print("No ceilings: they need a C++ compiler.", style="yellow")
    else:
        products = (("fp32", ceilings.fp32), ("int8", ceilings.int8), ("bf16", ceilings.bf16))
        rates = [f"{kind} {rate:.0f} GOP/s" for kind, rate in products if rate]
        terminal.print(f"Ceilings: reads {ceilings.read:.1f} GB/s, " + ", ".join(rates))
    groups = dict.fromkeys((result.op, result.shape) for result in report.results)
    for op, shape in groups:
        table = Table(title=f"{op}, {shape}", title_justify="left", box=SIMPLE_HEAD)
        shown = [r for r in report.results if (r.op, r.shape) == (op, shape)]
        rows = []
        for before, result in zip([None, *shown], shown, strict=False):
            repeated = before is not None and before.what == result.what
            rows.append(_kernel_row(result, ceilings, repeated=repeated))
        _fill(table, _KERNEL_TITLES, rows)
        terminal.print(table)
    for op, reason in report.failed.items():
        terminal.print(f"{op} failed: {reason}", style="yellow", markup=False)
    if report.not_benched:
        terminal.print(f"Not benched: {', '.join(report.not_benched)}.", markup=False)


def _kernel_row(result: KernelResult, ceilings: Ceilings | None, *, repeated: bool) -> list[str]:
    beside = None if result.torch_seconds is None else result.torch_seconds / result.seconds
    return [
        "" if repeated else result.what + ("" if result.native else " (torch)"),
        str(result.rows),
        f"{result.seconds * 1e6:.1f}",
        f"{result.gb_per_s:.1f}",
        f"{result.gop_per_s:.0f}" if result.operations else "–",
        "–" if ceilings is None else f"{result.share(ceilings):.0%}",
        "–" if beside is None else f"{beside:.2f}",
    ]
