"""`qwenkit bench serving --url …` and `--part http`: servers measured over HTTP."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import qwenkit
from qwenkit.bench.http_client import Target
from qwenkit.bench.http_load import LevelResult, LoadShape, SecondTurn
from qwenkit.bench.numbers import write_section
from qwenkit.bench.serving_http import (
    IN_PROCESS,
    PEERS,
    HttpReport,
    HttpSettings,
    measure_http,
    measure_url,
)
from qwenkit.bench.speed import SpeedSettings, machine
from qwenkit.checkpoint.atomic import replacing
from qwenkit.checkpoint.hub import resolve
from qwenkit.cli import console
from qwenkit.cli.bench_options import this_command
from qwenkit.cli.bench_tables import ProgressBar
from qwenkit.cli.options import check_name
from qwenkit.errors import UsageError

HEADING = "Serving over HTTP"
# What is aimed at, by number of clients and engine: our tokens per second over theirs.
BARS: dict[int, float] = {1: 1.2, 4: 2.0, 16: 2.5}
_MOST_COST, _MOST_SECOND, _MOST_BYTES, _MOST_START_S = 0.05, 0.3, 120e6, 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    """What is asked of servers, and where the figures go."""

    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Measure this OpenAI server in place of all else."),
    ] = None
    api_key: Annotated[str | None, typer.Option(metavar="KEY", help="Of the server at --url.")] = (
        None
    )
    name: Annotated[str, typer.Option(metavar="NAME", help="What --url calls its model.")] = (
        "default"
    )
    clients: Annotated[str, typer.Option(metavar="1,4,…", help="Clients at once, over HTTP.")] = (
        "1,4,16"
    )
    prompt_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Length of a prompt, over HTTP.")
    ] = 64
    requests_each: Annotated[
        int, typer.Option(metavar="N", min=1, help="Requests of a client in a turn, over HTTP.")
    ] = 2
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what --part http gives as JSON.")
    ] = None
    numbers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help=f'Write the table of --part http into this page: "{HEADING}".'
        ),
    ] = None


def read_clients(given: str) -> tuple[int, ...]:
    """ "1,4,16". Raises UsageError."""
    try:
        counts = tuple(dict.fromkeys(int(part) for part in given.split(",")))
    except ValueError:
        counts = ()
    if not counts or not all(1 <= count <= 1000 for count in counts):
        raise UsageError(f"--clients: expected numbers from 1 to 1000 like 1,4,16; got {given!r}.")
    return counts


def serve_url(
    options: HttpOptions, url: str, *, answer_tokens: int, turns: int, as_json: bool
) -> None:
    """Measure a running server and show it."""
    target = Target.parse(url, options.api_key)
    clients = read_clients(options.clients)
    shape = LoadShape(
        model=options.name,
        prompt_tokens=options.prompt_tokens,
        answer_tokens=answer_tokens,
        requests_each=options.requests_each,
    )
    with ProgressBar() as progress:
        levels, second = asyncio.run(
            measure_url(
                target,
                shape,
                clients,
                turns=turns,
                conversations=3,
                progress=progress,
            )
        )
    if as_json:
        console.say_json(
            {
                "bench": "serving-url",
                "url": target.url,
                "machine": machine(),
                "levels": [level.to_json() for level in levels],
                "second_turn": None if second is None else second.to_json(),
            }
        )
        return
    Console().print(_level_table(target.url, levels))
    for line in _second_lines(second):
        console.say(line)
    errors = [error for level in levels for error in level.errors]
    if errors:
        console.note(f"{len(errors)} requests failed, the first: {errors[0][:300]}")


def compare(
    options: HttpOptions,
    speed: SpeedSettings,
    *,
    has_peers: bool,
    as_json: bool,
) -> None:
    """Our server beside its peers, and what it costs."""
    peers = speed.peers if has_peers else PEERS
    for peer in peers:
        check_name("--peer", peer, PEERS)
    settings = HttpSettings(
        speed=replace(speed, peers=peers),
        clients=read_clients(options.clients),
        prompt_tokens=options.prompt_tokens,
        answer_tokens=speed.decode_tokens,
        requests_each=options.requests_each,
        default_model=resolve("default"),
    )
    with ProgressBar() as progress:
        report = measure_http(settings, progress=progress)
    keep_http(report, settings, options.out, options.numbers)
    if as_json:
        console.say_json(_content(report, settings))
    else:
        show_http(report)


def _level_table(title: str, levels: list[LevelResult]) -> Table:
    table = Table(title=title, caption="Milliseconds; tokens as the server counts them.")
    for name in ("clients", "tokens/s", "first p50", "first p99", "next p50", "next p99"):
        table.add_column(name, justify="right")
    table.add_column("failed", justify="right")
    for level in levels:
        table.add_row(str(level.clients), *_cells(level), str(len(level.errors) or ""))
    return table


def _cells(level: LevelResult) -> list[str]:
    speed = level.tokens_per_second
    waits = (level.first.p50_s, level.first.p99_s, level.between.p50_s, level.between.p99_s)
    return [
        "–" if speed is None else f"{speed:.1f}",
        *("–" if not wait else f"{1e3 * wait:,.1f}" for wait in waits),
    ]


def _second_lines(second: SecondTurn | None) -> list[str]:
    if second is None:
        return []
    return [
        f"First token of a second turn: {second.ratio:.2f} of the first turn's "
        f"({second.cached_tokens:,} of {second.prompt_tokens:,} tokens of its prompt were cached)."
    ]


def show_http(report: HttpReport) -> None:
    """The table beside peers, and the other figures beside their bars."""
    terminal = Console()
    table = Table(
        title="Closed loop over HTTP: tokens per second, and in brackets ours ÷ it",
        caption="llama.cpp and 'no HTTP' have no server around them.",
        box=SIMPLE_HEAD,
    )
    table.add_column("engine")
    for clients in report.levels:
        table.add_column(f"{clients} clients", justify="right")
    for engine in dict.fromkeys(name for level in report.levels.values() for name in level):
        table.add_row(engine, *(_speed(report, clients, engine) for clients in report.levels))
    terminal.print(table)
    for line in summary(report):
        console.say(line)


def _speed(report: HttpReport, clients: int, engine: str) -> str:
    level = report.levels[clients].get(engine)
    speed = None if level is None else level.tokens_per_second
    ratio = report.ratio(clients, engine)
    if speed is None or ratio is None:
        return "–"
    return f"{speed:.1f}" if engine == "qwenkit" else f"{speed:.1f} ({ratio:.2f})"


def summary(report: HttpReport) -> list[str]:
    """A line for each figure, with its bar and whether it is kept."""
    lines = []
    for clients, engines in report.levels.items():
        for engine in engines:
            ratio, bar = report.ratio(clients, engine), BARS.get(clients)
            if engine in ("qwenkit", IN_PROCESS) or ratio is None or bar is None:
                continue
            name = f"{clients} clients, tokens/s over {engine}'s"
            lines.append(_kept(f"{name}: {ratio:.2f}", f"at least {bar:g}", ratio >= bar))
    most = max(report.levels, default=0)
    ratio = report.ratio(most, IN_PROCESS)
    if ratio is not None:
        name = f"cost of HTTP at {most} clients: {1 - ratio:.1%}"
        lines.append(_kept(name, f"under {_MOST_COST:.0%}", 1 - ratio < _MOST_COST))
    if report.second_turn is not None:
        share = report.second_turn.ratio
        name = f"first token of a second turn over the first's: {share:.2f}"
        lines.append(_kept(name, f"at most {_MOST_SECOND:g}", share <= _MOST_SECOND))
    if report.server_bytes:
        over = report.over_bytes
        name = f"idle memory over the engine's: {over / 1e6:.0f} MB"
        lines.append(_kept(name, f"at most {_MOST_BYTES / 1e6:.0f}", over <= _MOST_BYTES))
    if report.start_s:
        start_s = sorted(report.start_s)[len(report.start_s) // 2]
        name = f"start to ready, default model: {start_s:.1f} s"
        lines.append(_kept(name, f"at most {_MOST_START_S:g}", start_s <= _MOST_START_S))
    lines += [f"{engine}: {reason}" for engine, reason in report.failed.items()]
    return lines


def _kept(what: str, bar: str, kept: bool) -> str:
    return f"{what} ({bar}: {'kept' if kept else 'NOT kept'})"


def keep_http(
    report: HttpReport, settings: HttpSettings, out: Path | None, numbers: Path | None
) -> None:
    """Write the figures as JSON, and the table into a page of numbers."""
    if out is not None:
        whole = json.dumps(_content(report, settings), indent=1)
        with replacing(out) as file:
            file.write((whole + "\n").encode())
    if numbers is not None:
        write_section(numbers, HEADING, _markdown(report))


def _content(report: HttpReport, settings: HttpSettings) -> dict[str, Any]:
    speed = settings.speed
    return {
        "bench": "serving-http",
        "qwenkit": qwenkit.__version__,
        "machine": machine(),
        "command": this_command(),
        "settings": {
            "model": speed.source.name,
            "threads": speed.threads,
            "turns": speed.turns,
            "prompt_tokens": settings.prompt_tokens,
            "answer_tokens": settings.answer_tokens,
            "requests_each": settings.requests_each,
        },
        **report.to_json(),
    }


def _markdown(report: HttpReport) -> str:
    engines = list(dict.fromkeys(name for level in report.levels.values() for name in level))
    head = "".join(f" {clients} clients |" for clients in report.levels)
    lines = [
        f"`{this_command()}`, {machine()}. Tokens per second of all clients, medians of turns; in "
        "brackets ours ÷ it, the median over turns that followed each other.",
        "",
        f"| engine | |{head}",
        f"| --- | --- |{' ---: |' * len(report.levels)}",
    ]
    for engine in engines:
        cells = "".join(f" {_speed(report, clients, engine)} |" for clients in report.levels)
        lines.append(f"| {engine} | {report.versions.get(engine, '')} |{cells}")
    return "\n".join([*lines, "", *(f"- {line}" for line in summary(report))]) + "\n"
