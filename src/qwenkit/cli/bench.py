"""`qwenkit bench …`: measurements, a table for people or `--json` for programs."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from qwenkit.bench.kernel_job import ROWS
from qwenkit.bench.kernels import DEFAULT_SHAPES, KernelSettings, measure_kernels
from qwenkit.bench.shapes import shape
from qwenkit.bench.sources import Source
from qwenkit.bench.speed import SpeedSettings, measure_speed
from qwenkit.checkpoint.hub import resolve
from qwenkit.cli import console, figures
from qwenkit.cli.bench_kv import kv
from qwenkit.cli.bench_memory import memory
from qwenkit.cli.bench_needle import needle
from qwenkit.cli.bench_options import (
    Contexts,
    GroupSize,
    Head,
    MakePeers,
    Model,
    PeerPython,
    Peers,
    ShapeName,
    Storage,
    Streams,
    WeightKind,
    cache_folder,
    chosen_peers,
    weight_setting,
)
from qwenkit.cli.bench_perplexity import perplexity
from qwenkit.cli.bench_reliability import reliability
from qwenkit.cli.bench_serving import serving
from qwenkit.cli.bench_tables import ProgressBar, show_kernels, show_speed
from qwenkit.cli.bench_tokenizer import compression, tokenizer

_DEFAULT_STREAMS = (8,)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure qwenkit beside other engines: in turns, warm, as medians.",
)


@app.callback()
def end_on_sigterm() -> None:
    """Let SIGTERM end this process as an error would: what was started ends with it."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


app.command()(perplexity)
app.command()(needle)
app.command()(kv)
app.command()(memory)
app.command()(compression)
app.command()(tokenizer)
app.command()(serving)
app.command()(reliability)


@app.command()
def speed(
    model: Model = "default",
    shape_name: ShapeName = None,
    storage: Storage = "Q4_0",
    weights: WeightKind = None,
    group_size: GroupSize = 128,
    head: Head = None,
    peer: Peers = None,
    make_peers: MakePeers = False,
    peer_python: PeerPython = None,
    threads: Annotated[int, typer.Option(help="Threads of every engine.", min=1)] = 2,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prefill.", min=1)] = 512,
    decode_tokens: Annotated[int, typer.Option(help="Tokens to decode.", min=1)] = 48,
    streams: Streams = None,
    context: Contexts = None,
    turns: Annotated[int, typer.Option(help="Measured turns of each engine.", min=1)] = 5,
    compute: Annotated[str, typer.Option(help="Our kernels: auto or reference.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Prefill and decode tokens per second, memory, and the ratio to other engines.

    The engines take turns (A B A B) in processes of their own, after one unmeasured turn, each
    turn between two calibrations of the machine. A figure of a peer that comes out slower than it
    is known to be on such a machine is void. Random weights and what the engines make of them are
    kept in the user's cache folder, below qwenkit/bench, the environments below qwenkit/peers.

    \b
    Examples:
      qwenkit bench speed                          the embedded default model
      qwenkit bench speed --shape qwen2-0.5b --storage Q8_0 --peer llama.cpp
      qwenkit bench speed --shape qwen2-0.5b --weights int4 --peer onnxruntime --make-peers
      qwenkit bench speed model.gguf --json > speed.json
    """
    setting = weight_setting(weights, group_size, head)
    if shape_name is not None:
        shape(shape_name)  # refuses an unknown one before anything is done
        source = Source(shape=shape_name, weights=setting, storage=storage)
    else:
        source = Source(model=resolve(model), weights=setting)
    settings = SpeedSettings(
        source=source,
        cache=cache_folder(),
        threads=threads,
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        streams=tuple(n for n in dict.fromkeys(streams or _DEFAULT_STREAMS) if n > 1),
        contexts=tuple(dict.fromkeys(context or ())),
        turns=turns,
        peers=chosen_peers(peer),
        peer_python=None if peer_python is None else str(peer_python),
        make_peers=make_peers,
        compute=compute,
    )
    with ProgressBar() as progress:
        result = measure_speed(settings, progress=progress)
    if as_json:
        console.say_json(result.to_json())
    else:
        show_speed(result)
        figures.say_beside(shape_name or model, "speed")


@app.command()
def kernels(
    op: Annotated[
        list[str] | None,
        typer.Option(help="Only this op, repeatable. [default: all]", show_default=False),
    ] = None,
    shape_name: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            help=f"Only this model's shapes, repeatable. [default: {', '.join(DEFAULT_SHAPES)}]",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(
            help="Only at so many rows, repeatable. "
            f"[default: {', '.join(str(count) for count in ROWS)}]",
            min=1,
            show_default=False,
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of every op.", min=1)] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Each op's GB/s and GOP/s beside the machine's ceilings and torch's own operator.

    Ops are called through the registry, as models call them, on more weights than caches hold.
    The ceilings are measured first, by a small program compiled for this processor.

    \b
    Examples:
      qwenkit bench kernels
      qwenkit bench kernels --op packed_matmul --shape qwen2-0.5b --rows 1 --rows 512
    """
    settings = KernelSettings(
        ops=tuple(dict.fromkeys(op or ())),
        shapes=tuple(dict.fromkeys(shape_name or DEFAULT_SHAPES)),
        rows=tuple(dict.fromkeys(rows or ROWS)),
        threads=threads,
    )
    with ProgressBar() as progress:
        result = measure_kernels(settings, progress=progress)
    if as_json:
        console.say_json(result.to_json())
    else:
        show_kernels(result)
