"""`qwenkit bench perplexity`: what each way of extending a model does beyond its trained length."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwenkit.bench.methods import METHODS
from qwenkit.bench.perplexity import (
    PerplexitySettings,
    PerplexityTable,
    measure_perplexity,
    read_table,
    write_table,
)
from qwenkit.checkpoint.digests import model_digest, text_digest
from qwenkit.checkpoint.hub import resolve
from qwenkit.cli import console, options
from qwenkit.cli.bench_options import make_folder, this_command
from qwenkit.cli.bench_tables import ProgressBar
from qwenkit.kernels import cpu
from qwenkit.load import load

_LENGTHS = (2048, 4096, 8192, 16384, 32768)


def perplexity(
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A UTF-8 text file.")],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A model: name, folder or .gguf file.")
    ] = "default",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A row, repeatable: {', '.join(METHODS)}. [default: all]", show_default=False
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            help=f"A column in tokens, repeatable. [default: {', '.join(map(str, _LENGTHS))}]",
            min=2,
            show_default=False,
        ),
    ] = None,
    windows: Annotated[int, typer.Option(help="Pieces of the text to average.", min=1)] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write perplexity.json, .md and .svg here after every pass, and go on from there.",
        ),
    ] = None,
    threads: options.Threads = None,
    compute: options.Compute = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Perplexity on a text by length (columns) and by way of extending the context (rows).

    per-request and as-config are what --rope does with the model's own configuration; the others
    put one method in its place: none, linear, dynamic (transformers' NTK), qwen-ntk (the first
    generation's), yarn, dual-chunk. A window's first tokens are those of every length. Long work:
    with --out an interrupted measurement goes on where it was.

    \b
    Examples:
      qwenkit bench perplexity book.txt --out results
      qwenkit bench perplexity book.txt --length 4096 --length 16384 --method none --method yarn
    """
    settings = PerplexitySettings(
        methods=tuple(dict.fromkeys(method or METHODS)),
        lengths=tuple(sorted(set(length or _LENGTHS))),
        windows=windows,
    )
    table = _measure(text, model, settings, out=out, threads=threads, compute=compute)
    if as_json:
        console.say_json(table.to_json())
    else:
        console.say(table.to_markdown(), end="")


def _measure(
    text: Path,
    model: str,
    settings: PerplexitySettings,
    *,
    out: Path | None,
    threads: int | None,
    compute: str,
) -> PerplexityTable:
    options.check_name("--compute", compute, options.COMPUTE)
    content = options.read_text_file("TEXT", text)
    if compute == "auto":
        cpu.register(threads=threads)
    loaded = load(resolve(model))
    table = PerplexityTable(
        model=loaded.record.name,
        text=text.name,
        trained_tokens=loaded.record.trained_context_tokens,
        windows=settings.windows,
        command=this_command(),
    )
    if out is not None:
        make_folder("--out", out)
        table.digests = {"model": model_digest(loaded.checkpoint), "text": text_digest(content)}
        table = read_table(out / "perplexity.json", table)

    def save(done: PerplexityTable) -> None:
        if out is not None:
            write_table(out, done)

    ids = loaded.tokenizer.encode(content)
    with ProgressBar() as progress:
        return measure_perplexity(loaded, ids, settings, table, save=save, progress=progress)
