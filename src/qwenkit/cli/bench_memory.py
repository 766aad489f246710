"""`qwenkit bench memory`: what `qwenkit plan` predicts, beside what happens."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from qwenkit.bench.memory import (
    Grid,
    MemoryReport,
    measure_memory,
    new_report,
    read_report,
    write_report,
)
from qwenkit.bench.peers.spec import WEIGHTS
from qwenkit.bench.shapes import SHAPES, shape
from qwenkit.cli import console, options
from qwenkit.cli.bench_options import cache_folder
from qwenkit.cli.bench_tables import ProgressBar

_SHAPES = ("qwen2-0.5b", "qwen2-1.5b")
_KINDS = ("bf16", "int8", "int4")
_USERS, _TOKENS = (1, 8), (1024, 8192)


Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        help=f"A published shape, repeatable: {', '.join(SHAPES)}. [default: {', '.join(_SHAPES)}]",
        show_default=False,
    ),
]
Kinds = Annotated[
    list[str] | None,
    typer.Option(
        help=f"How weights are held, repeatable: {', '.join(WEIGHTS)}. "
        f"[default: {', '.join(_KINDS)}]",
        show_default=False,
    ),
]
Users = Annotated[
    list[int] | None,
    typer.Option(help="Sequences at once, repeatable. [default: 1, 8]", min=1, show_default=False),
]
Tokens = Annotated[
    list[int] | None,
    typer.Option(
        help="Tokens of each, repeatable. [default: 1024, 8192]", min=2, show_default=False
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Write the figures here after every cell, and go on from there."
    ),
]


def memory(
    shape_name: Shapes = None,
    weights: Kinds = None,
    users: Users = None,
    tokens: Tokens = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
    out: Out = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """The memory that the plan predicts beside the most that was resident, with random weights.

    Each cell loads a model and serves its users in a process of its own; what is resident are
    anonymous pages and touched pages of files, as Linux counts them. All cells take most of an hour
    and up to 4 GB: with --out an interrupted measurement goes on where it was.

    \b
    Examples:
      qwenkit bench memory --shape qwen2-0.5b --weights int4 --users 1 --tokens 1024
      qwenkit bench memory --out memory.json
    """
    for name in shape_name or ():
        shape(name)  # refuses an unknown one before anything is done
    for kind in weights or ():
        options.check_name("--weights", kind, WEIGHTS)
    grid = Grid(
        shapes=tuple(dict.fromkeys(shape_name or _SHAPES)),
        weights=tuple(dict.fromkeys(weights or _KINDS)),
        users=tuple(dict.fromkeys(users or _USERS)),
        tokens=tuple(dict.fromkeys(tokens or _TOKENS)),
        threads=threads,
        cache=cache_folder(),
    )
    report = new_report(grid, shlex.join(["qwenkit", *sys.argv[1:]]))
    if out is not None:
        report = read_report(out, report)

    def save(done: MemoryReport) -> None:
        if out is not None:
            write_report(out, done)

    with ProgressBar() as progress:
        report = measure_memory(grid, report, save=save, progress=progress)
    if as_json:
        console.say_json(report.to_json())
    else:
        _show(report)


def _show(report: MemoryReport) -> None:
    table = Table(
        title="Most resident memory in MB: predicted and measured",
        caption=f"{report.machine}, {report.threads} threads.",
    )
    table.add_column("shape, weights")
    for title in ("users", "tokens", "predicted", "measured", "error"):
        table.add_column(title, justify="right")
    for cell in report.cells:
        table.add_row(
            f"{cell.shape} {cell.weights}",
            str(cell.users),
            f"{cell.tokens:,}",
            f"{cell.predicted.peak_bytes / 1e6:,.0f}",
            f"{cell.measured.peak_bytes / 1e6:,.0f}",
            f"{cell.error:+.1%}",
        )
    Console().print(table)
