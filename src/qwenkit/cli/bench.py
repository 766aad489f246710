"""`qwenkit bench …`: measurements, a table for people or `--json` for programs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from qwenkit.bench.random_model import write_random_gguf
from qwenkit.bench.shapes import SHAPES, shape
from qwenkit.bench.speed import (
    OURS,
    EngineResult,
    SpeedReport,
    SpeedSettings,
    measure_speed,
)
from qwenkit.bench.workers import ENGINES
from qwenkit.checkpoint.hub import resolve
from qwenkit.cli import console
from qwenkit.errors import UsageError, suggest

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure qwenkit beside other engines: in turns, warm, as medians.",
)

Report = Callable[[str, float], None]


@app.callback()
def _group() -> None:
    """Keep `speed` a command of its own while it is the only one."""


@app.command()
def speed(
    model: Annotated[
        str, typer.Argument(help="A model: name, folder or .gguf file.", show_default=True)
    ] = "default",
    shape_name: Annotated[
        str | None,
        typer.Option(
            "--shape",
            help=f"Random weights of a published shape instead: {', '.join(SHAPES)}.",
            show_default=False,
        ),
    ] = None,
    storage: Annotated[
        str, typer.Option(help="How --shape stores its matrices: Q4_0, Q8_0, BF16 …")
    ] = "Q4_0",
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="An engine to compare with, repeatable: llama.cpp, transformers, or none "
            "[default: both].",
            show_default=False,
        ),
    ] = None,
    peer_python: Annotated[
        Path | None,
        typer.Option(help="The Python that has the peers installed.", show_default="this one"),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of every engine.", min=1)] = 2,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prefill.", min=1)] = 512,
    decode_tokens: Annotated[int, typer.Option(help="Tokens to decode.", min=1)] = 48,
    turns: Annotated[int, typer.Option(help="Measured turns of each engine.", min=1)] = 5,
    compute: Annotated[str, typer.Option(help="Our kernels: auto or reference.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Prefill and decode tokens per second, memory, and the ratio to other engines.

    The engines take turns (A B A B) in processes of their own, after one unmeasured turn, each
    turn between two calibrations of the machine.

    \b
    Examples:
      qwenkit bench speed                          the embedded default model
      qwenkit bench speed --shape qwen2-0.5b --storage Q8_0 --peer llama.cpp
      qwenkit bench speed model.gguf --json > speed.json
    """
    peers = _peers(peer)
    with _progress() as report, tempfile.TemporaryDirectory() as folder:
        config = None if shape_name is None else shape(shape_name)
        if config is None:
            path = resolve(model)
        else:
            path = Path(folder) / f"{shape_name}-{storage}.gguf"
            write_random_gguf(
                path, config, storage=storage, progress=lambda s: report("writing weights", s)
            )
        settings = SpeedSettings(
            model=path,
            threads=threads,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            turns=turns,
            peers=peers,
            compute=compute,
            config=config,
            **({} if peer_python is None else {"peer_python": str(peer_python)}),
        )
        result = measure_speed(settings, progress=report)
    if as_json:
        console.say_json(result.to_json())
    else:
        _show(result)


def _peers(given: list[str] | None) -> tuple[str, ...]:
    known = [name for name in ENGINES if name != OURS]
    if given is None:
        return tuple(known)
    if "none" in given and len(given) > 1:
        raise UsageError("peer: 'none' stands alone.")
    for name in given:
        if name not in (*known, "none"):
            raise UsageError(f"peer: got {name!r}. {suggest(name, [*known, 'none'])}")
    return tuple(name for name in dict.fromkeys(given) if name != "none")


class _progress:
    """A bar on standard error while a measurement runs."""

    def __enter__(self) -> Report:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._progress.start()
        task = self._progress.add_task("", total=1.0)

        def report(what: str, share: float) -> None:
            self._progress.update(task, description=what, completed=share)

        return report

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()


def _show(report: SpeedReport) -> None:
    settings = report.settings
    table = Table(
        title=f"{settings.model.name}: tokens per second, median of {settings.turns} turns",
        caption=f"{report.machine}, {settings.threads} threads",
    )
    table.add_column("engine")
    for title in (
        f"prefill {settings.prompt_tokens}",
        "ours ÷ it",
        f"decode {settings.decode_tokens}",
        "ours ÷ it",
        "peak MB",
    ):
        table.add_column(title, justify="right")
    for engine in report.engines:
        table.add_row(*_row(report, engine))
    terminal = Console()
    terminal.print(table)
    for engine in report.engines:
        if engine.error is not None:
            what = "was left out" if engine.version is None else "failed while it was measured"
            terminal.print(f"{engine.engine} {what}: {engine.error}", style="yellow", markup=False)
    if any(engine.version is None for engine in report.engines):
        terminal.print("Peers are installed by: pip install 'qwenkit[bench]'", markup=False)
    unsteady = report.unsteady_turns()
    if unsteady:
        terminal.print(
            f"The machine itself moved by more than 10 % during {unsteady} of "
            f"{report.turn_count()} turns: trust the ratios more than the figures, and repeat.",
            style="yellow",
        )


def _row(report: SpeedReport, engine: EngineResult) -> list[str]:
    name = f"{engine.engine} {engine.version or ''}".strip()
    cells = [name]
    for measure in ("prefill", "decode"):
        median = engine.median(measure)
        ratio = None if engine.engine == OURS else report.ratio(engine, measure)
        cells.append("–" if median is None else f"{median:.1f}")
        cells.append("–" if ratio is None else f"{ratio:.2f}")
    cells.append(f"{engine.peak_bytes / 1e6:.0f}" if engine.peak_bytes else "–")
    return cells
