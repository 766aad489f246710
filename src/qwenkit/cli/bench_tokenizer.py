"""`qwenkit bench compression` and `qwenkit bench tokenizer`: tokens per text, text per second."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from qwenkit.bench.compression import (
    CompressionTable,
    TextFacts,
    measure_compression,
    read_table,
    read_texts,
    write_table,
)
from qwenkit.bench.encoders import PEER_PACKAGES, Encoder, peer_of
from qwenkit.bench.encoding_speed import measure_encoding
from qwenkit.checkpoint.hub import resolve
from qwenkit.checkpoint.vocabulary import open_tokenizer
from qwenkit.cli import console, options
from qwenkit.cli.bench_options import make_folder
from qwenkit.cli.bench_tables import ProgressBar
from qwenkit.errors import UsageError


def compression(
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LANG=FILE", help="A language's text, repeatable.", show_default=False
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help='A folder of LANG.txt files, or a .jsonl file of lines with "lang" and "text".',
        ),
    ] = None,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A model, folder or vocabulary file; tokenizers:FILE, transformers:MODEL or "
            "tiktoken:ENCODING. Repeatable; the first is compared with. [default: the embedded "
            "model's]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write compression.json, .md and .svg here after every text; go on from there.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Bytes and characters per token, by language and tokenizer, on texts of your own.

    The ratio is the tokens of the first tokenizer over those of another: above 1, the other needs
    fewer. Texts of different content cannot be compared with each other, only tokenizers can.

    \b
    Examples:
      qwenkit bench compression --text en=book.txt --text th=thai.txt --tokenizer qwen.tiktoken
      qwenkit bench compression --texts corpus --tokenizer tokenizers:xlm-r/tokenizer.json \\
        --tokenizer Qwen/Qwen2-0.5B-Instruct --out results
    """
    table = _count(read_texts(text or (), texts), tokenizer or [options.DEFAULT_MODEL], out)
    if as_json:
        console.say_json(table.to_json())
    else:
        console.say(table.to_markdown(), end="")


def _count(content: dict[str, str], tokenizers: list[str], out: Path | None) -> CompressionTable:
    table = CompressionTable(
        tokenizers=tuple(dict.fromkeys(tokenizers)),
        texts={language: TextFacts.of(text) for language, text in content.items()},
        command=shlex.join(["qwenkit", *sys.argv[1:]]),
    )
    if out is not None:
        make_folder("--out", out)
        table = read_table(out / "compression.json", table)

    def save(done: CompressionTable) -> None:
        if out is not None:
            write_table(out, done)

    with ProgressBar() as progress:
        table = measure_compression(content, table, save=save, progress=progress)
    save(table)
    return table


def tokenizer(
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A UTF-8 text file.")],
    model: Annotated[
        str,
        typer.Option(metavar="MODEL", help="Whose vocabulary: name, folder, .gguf or file of it."),
    ] = options.DEFAULT_MODEL,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A package to compare with, repeatable: {', '.join(PEER_PACKAGES)}, or none. "
            "[default: those that are installed]",
            show_default=False,
        ),
    ] = None,
    turns: Annotated[int, typer.Option(help="Measured turns of each.", min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Encoding speed in MB/s beside other packages, over the same vocabulary, on one thread.

    They take turns (A B A B) after one that is not measured; the figure is the median. Ids are
    compared with ours: a peer that does not compose characters (NFC) differs on some texts.

    \b
    Examples:
      qwenkit bench tokenizer book.txt --model qwen.tiktoken
      qwenkit bench tokenizer book.txt --model Qwen/Qwen2-0.5B-Instruct --peer tiktoken
    """
    content = options.read_text_file("TEXT", text)
    if not content:
        raise UsageError(f"TEXT {str(text)!r} is empty.")
    ours = open_tokenizer(resolve(model))
    encoders = [Encoder("qwenkit", ours.encode)]
    for name in peer if peer is not None else PEER_PACKAGES:
        if name == "none":
            continue
        try:
            encoders.append(peer_of(ours, name))
        except UsageError as error:
            if peer is not None:
                raise
            console.note(f"Left out: {error}")
    with ProgressBar() as progress:
        results = measure_encoding(encoders, content, turns=turns, progress=progress)
    if as_json:
        console.say_json([result.to_json() for result in results])
        return
    console.say("| tokenizer | MB/s | ours ÷ it | ids |\n| --- | ---: | ---: | --- |")
    for result in results:
        ratio = results[0].median / result.median
        ids = "the same" if result.same_ids else "differ"
        console.say(f"| {result.name} | {result.median:.1f} | {ratio:.2f} | {ids} |")
