"""`qwenkit bench kv`: what each way of keeping keys and values costs and changes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwenkit.bench.kv import KvSettings, measure_kv
from qwenkit.checkpoint.hub import resolve
from qwenkit.cli import console, options
from qwenkit.cli.bench_tables import ProgressBar
from qwenkit.engine.kv import NAMED_DTYPES
from qwenkit.kernels import cpu
from qwenkit.load import load


def kv(
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A UTF-8 text file.")],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A model: name, folder or .gguf file.")
    ] = "default",
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A row, repeatable: {', '.join(NAMED_DTYPES)}. [default: all]",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="So many of the text.", min=2)] = 1024,
    guard: Annotated[
        bool,
        typer.Option("--guard/--no-guard", help="Guard narrow keys against outliers, as always."),
    ] = True,
    threads: options.Threads = None,
    compute: options.Compute = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Bytes per token of each kind of KV cache, and its agreement with bf16 on a text.

    Every token of the text is computed over a cache of each kind. The table has the mean KL
    divergence from the distributions over a bf16 cache, the share of tokens after which both find
    the same token likeliest, and the perplexity. int4 keeps layers whose keys have strong outliers
    in int8, and both keep layers with extreme ones in bf16.

    \b
    Examples:
      qwenkit bench kv book.txt
      qwenkit bench kv book.txt --model ./Qwen2.5-7B-Instruct --kind int4 --no-guard
    """
    settings = KvSettings(
        kinds=tuple(dict.fromkeys(kind or NAMED_DTYPES)), tokens=tokens, guarded=guard
    )
    options.check_name("--compute", compute, options.COMPUTE)
    content = options.read_text_file("TEXT", text)
    if compute == "auto":
        cpu.register(threads=threads)
    loaded = load(resolve(model))
    ids = loaded.tokenizer.encode(content)
    with ProgressBar() as progress:
        table = measure_kv(loaded, ids, settings, text=text.name, progress=progress)
    if as_json:
        console.say_json(table.to_json())
    else:
        console.say(table.to_markdown(), end="")
