"""`qwenkit bench reliability`: what goes wrong in the world, done to the server on purpose."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated

import typer

from qwenkit.bench.http_client import Target
from qwenkit.bench.numbers import write_section
from qwenkit.bench.reliability.board import BoardSettings
from qwenkit.bench.reliability.report import BoardReport
from qwenkit.bench.reliability.runner import run_rows
from qwenkit.bench.reliability.spec import NAMES, Result, Row, chosen_rows, missing_rows
from qwenkit.bench.speed import machine
from qwenkit.checkpoint.atomic import replacing
from qwenkit.cli import console
from qwenkit.cli.bench_options import cache_folder, this_command
from qwenkit.cli.bench_tables import ProgressBar
from qwenkit.errors import UsageError

HEADING = "The board of reliability"
_PACKAGE = Path(__file__).parents[1]

Rows = Annotated[
    str | None,
    typer.Option(
        metavar="9,10,…", help="Only these rows. [default: all that are here]", show_default=False
    ),
]
Url = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Somebody else's server; only rows that need no process."),
]
ApiKey = Annotated[str | None, typer.Option(metavar="KEY", help="Of the server at --url.")]
Name = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="What --url calls its model.")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write everything here as JSON.")
]
Numbers = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help=f'Write the table into this page, under "{HEADING}".'),
]


def reliability(
    rows: Rows = None,
    full: Annotated[
        bool, typer.Option("--full/--quick", help="The long form, or the one under 8 minutes.")
    ] = False,
    url: Url = None,
    api_key: ApiKey = None,
    name: Name = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of everything random.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of the server.", min=1)] = 2,
    make_tools: Annotated[
        bool, typer.Option("--make-tools", help="Make the environment that row 10 needs.")
    ] = False,
    as_json: JsonFile = None,
    numbers: Numbers = None,
) -> None:
    """What kept its promise when everything went wrong: a row for each kind of fault.

    Each line has a row's number and name, how many of its cases held, the worst time and the most
    memory that the server took. What did not hold is kept below qwenkit/bench/failures in the
    user's cache and tried again by every later run. The model is random, of two layers, with the
    real vocabulary. Ends with status 1 when a promise was broken.

    \b
    Examples:
      qwenkit bench reliability
      qwenkit bench reliability --rows 9,18 --json board.json
      qwenkit bench reliability --rows 9 --url http://127.0.0.1:8000 --name default
    """
    chosen = chosen_rows(None if rows is None else _numbers(rows))
    settings = BoardSettings(
        cache=cache_folder(),
        size="full" if full else "quick",
        seed=seed,
        target=None if url is None else Target.parse(url, api_key),
        model_name=name,
        checkout=_checkout(),
        make_tools=make_tools,
        threads=threads,
    )
    report = asyncio.run(_run(chosen, settings))
    if as_json is not None:
        with replacing(as_json) as file:
            file.write((json.dumps(report.to_json(), indent=1) + "\n").encode())
    if numbers is not None:
        write_section(numbers, HEADING, report.to_markdown())
    if rows is None:
        for number, missing in missing_rows().items():
            console.say(f"{number:>2}  {missing:<24}{'not here yet':>14}")
    if not report.holds:
        raise typer.Exit(1)


async def _run(rows: list[Row], settings: BoardSettings) -> BoardReport:
    results: list[Result] = []
    start_s = time.perf_counter()
    with ProgressBar() as progress:
        share = 0.0

        def say(what: str) -> None:
            progress(what, share)

        async for result in run_rows(rows, settings, say=say):
            results.append(result)
            share = len(results) / len(rows)
            progress.say(result.line())
            for failure in result.tally.failures[:8]:
                progress.say(f"    {failure.case}: {failure.detail[:200]}")
            if result.tally.unavailable is not None:
                progress.say(f"    {result.tally.unavailable}")
    return BoardReport(
        results=results,
        size=settings.size,
        seed=settings.seed,
        machine=machine(),
        command=this_command(),
        seconds=time.perf_counter() - start_s,
    )


def _numbers(given: str) -> list[int]:
    """9,10,12 or 9-12. Raises UsageError."""
    found: list[int] = []
    for part in given.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"--rows: expected numbers such as 9,10 or 9-12, got {given!r}.")
        found += range(int(first), int(last if dash else first) + 1)
    if max(found, default=0) > max(NAMES):
        raise UsageError(f"--rows: there is no row {max(found)}; the last is {max(NAMES)}.")
    return found


def _checkout() -> Path | None:
    """The source checkout that this package is run from; None for an installed one."""
    root = _PACKAGE.parents[1]
    return root if (root / "tests").is_dir() and (root / "pyproject.toml").is_file() else None
