"""`qwenkit bench needle`: how much of a long context a model finds things in."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenkit.bench.methods import METHODS
from qwenkit.bench.needle import (
    ANSWER_TOKENS,
    NeedleSettings,
    NeedleTable,
    measure_needle,
    read_table,
    write_table,
)
from qwenkit.bench.needle_reader import ModelReader
from qwenkit.bench.needle_text import CODE, Hunt, Needle, built_in, languages
from qwenkit.checkpoint.digests import model_digest, text_digest
from qwenkit.cli import console, options
from qwenkit.cli.bench_options import make_folder, this_command
from qwenkit.cli.bench_tables import ProgressBar
from qwenkit.cli.grouped import grouped
from qwenkit.cli.loading import load_model
from qwenkit.errors import UsageError

if TYPE_CHECKING:
    from qwenkit.api import LLM

_LENGTHS = (1024, 2048, 4096, 8192)
_DEPTHS = (0, 25, 50, 75, 100)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GridOptions:
    """What is measured; see `qwenkit.cli.grouped`."""

    length: Annotated[
        list[int] | None,
        typer.Option(
            help="A column: tokens of prompt and answer together, repeatable. "
            f"[default: {', '.join(map(str, _LENGTHS))}]",
            min=1,
            show_default=False,
        ),
    ] = None
    depth: Annotated[
        list[int] | None,
        typer.Option(
            help="A row: percent of the text before the needle, repeatable. "
            f"[default: {', '.join(map(str, _DEPTHS))}]",
            min=0,
            max=100,
            show_default=False,
        ),
    ] = None
    rope: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A map, repeatable: {', '.join(METHODS)}. [default: per-request]",
            show_default=False,
        ),
    ] = None

    def settings(self) -> NeedleSettings:
        """Read and checked. Raises UsageError."""
        return NeedleSettings(
            ropes=tuple(dict.fromkeys(self.rope or ("per-request",))),
            lengths=tuple(sorted(set(self.length or _LENGTHS))),
            depths=tuple(sorted(set(self.depth or _DEPTHS))),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HuntOptions:
    """What is hidden in what; see `qwenkit.cli.grouped`."""

    language: Annotated[
        str, typer.Option(help=f"Of text and question: {', '.join(languages())}.")
    ] = "en"
    needles: Annotated[int, typer.Option(help="Numbers hidden and asked for at once.", min=1)] = 1
    haystack: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A UTF-8 text of your own to hide needles in."),
    ] = None
    own_needle: Annotated[
        list[str] | None,
        typer.Option(
            "--needle",
            metavar="TEXT",
            help="A sentence of your own to hide, repeatable; {code} in it becomes a new number.",
        ),
    ] = None
    answer: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="What the reply must have of each --needle, or {code}."),
    ] = None
    question: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What is asked with --needle.")
    ] = None

    @property
    def name(self) -> str:
        """Of the haystack."""
        return self.language if self.haystack is None else self.haystack.name

    def hunt(self) -> Hunt:
        """Read and checked. Raises UsageError."""
        text = "" if self.haystack is None else options.read_text_file("--haystack", self.haystack)
        if self.haystack is not None and not text.strip():
            raise UsageError(f"--haystack: {str(self.haystack)!r} has no text.")
        hunt = built_in(self.language, needles=self.needles, text=text)
        own, answers = self.own_needle or [], self.answer or []
        if not own and not answers and self.question is None:
            return hunt
        if not own or self.question is None or len(answers) != len(own):
            raise UsageError("--needle takes an --answer each, and one --question for all.")
        if self.needles != 1:
            raise UsageError("--needles counts the built-in ones; give --needle so many times.")
        hidden = tuple(Needle(*pair) for pair in zip(own, answers, strict=True))
        for needle in hidden:
            if CODE in needle.answer and CODE not in needle.text:
                raise UsageError(f"--answer has {CODE}, but --needle {needle.text!r} has not.")
        return dataclasses.replace(hunt, question=self.question, needles=hidden)


@grouped
def needle(
    model: options.ModelName = None,
    *,
    grid: GridOptions,
    what: HuntOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write needle.json, .md and .svg here after every cell, and go on from there.",
        ),
    ] = None,
    threads: options.Threads = None,
    compute: options.Compute = "auto",
    offline: options.Offline = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Needle in a haystack: what a model finds in a text, by its length (columns) and the depth at
    which it stands (rows).

    A sentence with a number is hidden between the sentences of a text, and the number asked for in
    one chat turn of the model's own template, answered greedily. The sequence, prompt and room for
    the answer, has exactly the length of its column. Several needles: the first at the depth, the
    others in equal steps to the end; the score is the share that is found. --rope compares ways
    of extending the context as `qwenkit bench perplexity` does. Long work: with --out an
    interrupted measurement goes on where it was.

    \b
    Examples:
      qwenkit bench needle --out results
      qwenkit bench needle Qwen/Qwen2-0.5B-Instruct --language zh --needles 3 --length 32768
      qwenkit bench needle --length 16384 --rope none --rope yarn --rope dual-chunk
      qwenkit bench needle --haystack book.txt --needle "Ada's cat is called {code}." \\
        --answer "{code}" --question "What is Ada's cat called?"
    """
    settings, hunt = grid.settings(), what.hunt()
    if out is not None:
        make_folder("--out", out)
    name = options.check_model_name(model)
    given = options.ModelOptions(threads=threads, compute=compute, offline=offline)
    with load_model(name, given) as llm:
        table = _measure(llm, hunt, settings, what.name, compute, out)
    if as_json:
        console.say_json(table.to_json())
    else:
        console.say(table.to_markdown(), end="")


def _measure(
    llm: LLM, hunt: Hunt, settings: NeedleSettings, haystack: str, compute: str, out: Path | None
) -> NeedleTable:
    table = NeedleTable(
        model=llm.record.name,
        compute=compute,
        haystack=haystack,
        question=hunt.question,
        needles=tuple(needle.text for needle in hunt.needles),
        answers=tuple(needle.answer for needle in hunt.needles),
        answer_tokens=ANSWER_TOKENS * len(hunt.needles),
        command=this_command(),
    )
    if out is not None:
        digest = text_digest(hunt.instruction, hunt.gap, *hunt.sentences, hunt.text)
        table.digests = {"model": model_digest(llm.checkpoint), "haystack": digest}
        table = read_table(out / "needle.json", table)

    def reader(rope: str, longest: int) -> ModelReader:
        return ModelReader(llm, rope, longest, reference=compute == "reference")

    def save(done: NeedleTable) -> None:
        if out is not None:
            write_table(out, done)

    with ProgressBar() as progress:
        return measure_needle(reader, hunt, settings, table, save=save, progress=progress)
