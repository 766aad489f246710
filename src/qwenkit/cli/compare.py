"""`qwenkit compare`: what a model lost beside the one it was made of."""

from __future__ import annotations

from typing import Annotated

import typer

from qwenkit.checkpoint.hub import resolve
from qwenkit.cli import console, download, figures, options
from qwenkit.cli import quality_options as quality
from qwenkit.cli.grouped import grouped

Parent = Annotated[
    str, typer.Argument(metavar="PARENT", help="Name on the hub, folder or .gguf file.")
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="The one that was made of it.")]


Speed = Annotated[bool, typer.Option("--speed", help="Measure how fast MODEL writes.")]


@grouped
def command(
    parent: Parent,
    model: Model,
    judged: quality.JudgeOptions,
    max_len: quality.MaxLen = None,
    speed: Speed = False,
    threads: options.Threads = None,
    as_json: quality.AsJson = False,
    offline: options.Offline = False,
) -> None:
    """Show a quantized, merged or converted model beside its parent: perplexity, KL, the share of
    tokens after which both find the same one likeliest, and the matrices furthest apart.

    What was published of the parent and its quantized forms is shown below.

    Without --text both are run on random tokens: enough to find a matrix that is wrong, not to say
    what is lost. Ends with status 1 where the model is beyond the limits, or where a matrix is off
    by more than any rounding makes it.

    \b
    Examples:
      qwenkit compare ./model ./model-gptq --text book.txt
      qwenkit compare default ./smollm2-awq --text chats.jsonl --json
    """
    limits = judged.limits()
    with download.bars() as bars:
        paths = [resolve(name, offline=offline, progress=bars) for name in (parent, model)]
    import torch  # seconds that --help does without

    from qwenkit.quantize.calibrate import read_rows
    from qwenkit.quantize.judge import measure
    from qwenkit.quantize.stream import LayerSource

    if threads is not None:
        torch.set_num_threads(threads)
    first = LayerSource(paths[0])
    shown = read_rows(
        (), judged.text or (), first.tokenizer, first.record, most_rows=1, most_tokens=max_len
    )
    with console.progress(f"Comparing {model} with {parent} …") as show, torch.inference_mode():
        sheet = measure(
            first, paths[1], shown.judging, shown.note, limits=limits, name=model, told=show
        )
    if speed:
        from qwenkit.bench.writing import writing_speed

        sheet.tokens_per_second = {"one stream": writing_speed(paths[1], threads=threads)}
    if as_json:
        console.say_json(sheet.to_json())
    else:
        console.say(sheet.to_markdown(), end="")
        figures.say_beside(parent, "quality")
    if sheet.refusals():
        raise typer.Exit(1)
