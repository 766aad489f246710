"""`qwenkit bench serving`: many requests at once, and what the engine itself costs."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from qwenkit.bench.peers.spec import WeightSetting
from qwenkit.bench.serving import PARTS, Part, ServingReport, ServingSettings, measure_serving
from qwenkit.bench.serving_load import LoadResult, LoadSettings, Percentiles
from qwenkit.bench.shapes import shape
from qwenkit.bench.sources import Source
from qwenkit.bench.speed import SpeedSettings
from qwenkit.checkpoint.hub import resolve
from qwenkit.cli import console, options
from qwenkit.cli.bench_http import HttpOptions, compare, serve_url
from qwenkit.cli.bench_options import (
    GroupSize,
    Head,
    MakePeers,
    Model,
    PeerPython,
    Peers,
    ShapeName,
    Storage,
    WeightKind,
    cache_folder,
    chosen_peers,
    weight_setting,
)
from qwenkit.cli.bench_tables import ProgressBar, show_speed
from qwenkit.cli.grouped import grouped
from qwenkit.errors import UsageError

OVER_HTTP = "http"

OnlyParts = Annotated[
    list[str] | None,
    typer.Option(
        "--part",
        help=f"Only this part, repeatable: {', '.join(PARTS)}; or {OVER_HTTP}, alone. "
        f"[default: all but {OVER_HTTP}]",
        show_default=False,
    ),
]


@grouped
def serving(
    model: Model = "default",
    part: OnlyParts = None,
    shape_name: ShapeName = None,
    storage: Storage = "Q4_0",
    weights: WeightKind = None,
    group_size: GroupSize = 128,
    head: Head = None,
    peer: Peers = None,
    make_peers: MakePeers = False,
    peer_python: PeerPython = None,
    threads: Annotated[int, typer.Option(help="Threads of every engine.", min=1)] = 2,
    streams: Annotated[int, typer.Option(help="Sequences that decode at once.", min=2)] = 8,
    decode_tokens: Annotated[int, typer.Option(help="Tokens that each decodes.", min=1)] = 48,
    rate: Annotated[float, typer.Option(help="Requests a second, on average.")] = 1.0,
    requests: Annotated[int, typer.Option(help="Requests of one load.", min=1)] = 32,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 0,
    turns: Annotated[int, typer.Option(help="Measured turns of each engine.", min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    *,
    http: HttpOptions,
) -> None:
    """Serving many requests: speed, waits under load, the engine's own cost, and what it saves.

    "decode" is the speed of several streams, "load" the waits of requests that come at random
    times, beside other engines in turns (llama.cpp in slots, transformers in batches). "overhead"
    is what a step costs beyond its kernels, "prefix" questions about a long text and "lookup" small
    changes of code, with what saves work there and without. "http", only where it is asked for, is
    our server beside vLLM's and llama.cpp's own decoding; --url measures any OpenAI server instead.

    \b
    Examples:
      qwenkit bench serving                        the embedded default model
      qwenkit bench serving --shape qwen2-0.5b --weights int4 --group-size 32
      qwenkit bench serving --url http://127.0.0.1:8000 --clients 1,4,16
      qwenkit bench serving --part http --shape qwen2-0.5b --weights int4 --group-size 32
    """
    if http.url is not None:
        serve_url(http, http.url, answer_tokens=decode_tokens, turns=turns, as_json=as_json)
        return
    setting = weight_setting(weights, group_size, head)
    source = _source(model, shape_name, setting, storage)
    speed = SpeedSettings(
        source=source,
        cache=cache_folder(),
        threads=threads,
        decode_tokens=decode_tokens,
        turns=turns,
        peers=chosen_peers(peer),
        peer_python=None if peer_python is None else str(peer_python),
        make_peers=make_peers,
    )
    if part == [OVER_HTTP]:
        compare(http, speed, has_peers=peer is not None, as_json=as_json)
        return
    load = LoadSettings(rate=rate, requests=requests, streams=streams, turns=turns, seed=seed)
    parts = _parts(part, is_random=shape_name is not None)
    _measure(ServingSettings(speed=speed, load=load, parts=parts, streams=streams), as_json)


def _measure(settings: ServingSettings, as_json: bool) -> None:
    with ProgressBar() as progress:
        report = measure_serving(settings, progress=progress)
    _show(report, as_json=as_json)


def _source(
    model: str, shape_name: str | None, setting: WeightSetting | None, storage: str
) -> Source:
    if shape_name is None:
        return Source(model=resolve(model), weights=setting)
    shape(shape_name)  # refuses an unknown one before anything is done
    return Source(shape=shape_name, weights=setting, storage=storage)


def _parts(given: list[str] | None, *, is_random: bool) -> tuple[Part, ...]:
    """The parts to measure, in their order; by default all that the model is good for."""
    if given is None:
        return tuple(part for part in PARTS if not (is_random and part == "lookup"))
    for part in given:
        options.check_name("--part", part, (*PARTS, OVER_HTTP))
    if OVER_HTTP in given:
        raise UsageError(f"--part {OVER_HTTP} stands alone.")
    return tuple(part for part in PARTS if part in given)


def _show(report: ServingReport, *, as_json: bool) -> None:
    if as_json:
        console.say_json(report.to_json())
        return
    if report.decode is not None:
        show_speed(report.decode)
    terminal = Console()
    if report.load:
        terminal.print(_load_table(report))
    if "overhead" in report.own:
        terminal.print(_overhead_table(report.own["overhead"]))
    compared = [*report.own.get("prefix", ()), *report.own.get("lookup", ())]
    if compared:
        terminal.print(_comparison_table(compared))
    for result in report.load:
        if result.engine.error is not None:
            line = f"{result.engine.engine}, load: {result.engine.error}"
            terminal.print(line, style="yellow", markup=False)


def _load_table(report: ServingReport) -> Table:
    load = report.settings.load
    table = Table(
        title=f"{report.settings.speed.source.name}: {load.requests} requests, {load.rate:g} a "
        f"second; turns: {load.turns}",
        caption="Milliseconds until a request's first token, and from one to its next.",
    )
    table.add_column("engine")
    for title in ("tokens/s", "first p50", "first p99", "next p50", "next p99"):
        table.add_column(title, justify="right")
    for result in report.load:
        table.add_row(f"{result.engine.engine} {result.engine.version or ''}", *_waits(result))
    return table


def _waits(result: LoadResult) -> list[str]:
    speed = result.median_speed()
    if speed is None:
        return ["–"] * 5
    first, following = Percentiles.of(result.first_s), Percentiles.of(result.between_s)
    waits = (first.p50_s, first.p99_s, following.p50_s, following.p99_s)
    return [f"{speed:.1f}", *(f"{1e3 * wait:,.0f}" for wait in waits)]


def _overhead_table(results: list[dict[str, Any]]) -> Table:
    first = results[0]
    own = [str(result["sampling"]) for result in results if result["sampling"] != "greedy"]
    table = Table(
        title=f"A step of {first['streams']} streams, {first['vocab_rows']:,} logits each, in ms",
        caption="Kept: the model's kernels alone ÷ the step. Own: " + "; ".join(own) + ".",
        box=SIMPLE_HEAD,
    )
    table.add_column("")
    for title in ("step", "alone", "kept", "schedule", "batch", "sample", "text", "rest"):
        table.add_column(title, justify="right")
    parts = ("step", "alone", "scheduling", "batch", "sampling", "text", "rest")
    for result in results:
        cells = [f"{result[f'{part}_ms']:.2f}" for part in parts]
        name = "greedy" if result["sampling"] == "greedy" else "own"
        table.add_row(name, *cells[:2], f"{result['kept']:.1%}", *cells[2:])
    return table


def _comparison_table(results: list[dict[str, Any]]) -> Table:
    table = Table(
        title="The same requests without and with it, the same answers",
        caption="Seconds. Share: of prompt tokens that were cached, or of guesses that stood.",
        box=SIMPLE_HEAD,
    )
    table.add_column("what")
    for title in ("requests", "tokens", "out", "without", "with", "faster", "share"):
        table.add_column(title, justify="right")
    for result in results:
        table.add_row(
            str(result["what"]),
            *(f"{result[name]:,}" for name in ("requests", "prompt_tokens", "answer_tokens")),
            f"{min(result['without_s']):.2f}",
            f"{min(result['with_s']):.2f}",
            f"{result['ratio']:.2f} ×",
            f"{result['share']:.0%}",
        )
    return table
