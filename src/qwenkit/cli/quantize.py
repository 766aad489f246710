"""`qwenkit quantize`: a model in fewer bits, with the sheet of what that cost."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenkit.checkpoint.hub import resolve
from qwenkit.cli import console, download, options
from qwenkit.cli import quality_options as quality
from qwenkit.cli.grouped import grouped
from qwenkit.errors import UsageError

if TYPE_CHECKING:
    from qwenkit.checkpoint.spec import Checkpoint
    from qwenkit.quantize.layer import MatrixResult
    from qwenkit.quantize.report import Limits, Sheet
    from qwenkit.quantize.run import Step
    from qwenkit.quantize.settings import QuantizeSettings

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Name on the hub, folder or .gguf file."),
]
Out = Annotated[str | None, typer.Argument(metavar="OUT", help="The folder to write.")]
ModelFlag = Annotated[
    str | None,
    typer.Option("--model_name_or_path", metavar="MODEL", help="MODEL, as run_gptq.py has it."),
]
OutFlag = Annotated[
    str | None, typer.Option("--out_path", metavar="OUT", help="OUT, as run_gptq.py has it.")
]
Method = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="gptq or awq, which look at data; rtn, nf4 or int8, which do not.",
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(metavar="N", help="2, 3, 4 or 8 for gptq, awq and rtn. [default: 4]"),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        "--group_size",
        metavar="N",
        help="Columns to a scale: 128, 64, 32, or -1 for a whole row; where it does not divide "
        "the width, the largest smaller one that does. [default: 128]",
    ),
]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        "--data_path",
        metavar="FILE",
        help='Conversations of fine-tuning (JSON or JSONL), {"text"} lines or plain text to '
        "calibrate on; may be given several times.",
    ),
]
Damp = Annotated[float, typer.Option(metavar="X", help="Of gptq: share added to the diagonal.")]
ActOrder = Annotated[
    bool,
    typer.Option("--act-order", help="Of gptq: columns that matter most first. Slower to read."),
]
Symmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--no-symmetric",
        help="Zero in the middle of the levels. [default: yes, of awq no]",
        show_default=False,
    ),
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        metavar="PATTERN=BITS",
        help="Other bits, or 'keep', for matrices whose path the regular expression is found in; "
        "may be given several times, the last one counts.",
    ),
]
PadForTp = Annotated[
    int | None,
    typer.Option(
        "--pad-for-tp",
        metavar="N",
        min=1,
        help="Widen the feed-forward parts by zeros first, so that N devices share whole groups.",
        show_default=False,
    ),
]
Speed = Annotated[
    bool, typer.Option("--speed/--no-speed", help="Measure how fast the result writes.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Write the result even if it is beyond the limits.")
]
ShardSize = Annotated[
    str, typer.Option("--shard-size", metavar="SIZE", help="Largest file of weights, as 5GB.")
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """How numbers are chosen and kept; see `qwenkit.cli.grouped`."""

    method: Method = "gptq"
    bits: Bits = None
    group_size: GroupSize = None
    data: Data = None
    rows: quality.Rows = 128
    max_len: quality.MaxLen = None
    damp: Damp = 0.01
    act_order: ActOrder = False
    symmetric: Symmetric = None
    rule: Rules = None
    pad_for_tp: PadForTp = None

    def settings(self) -> QuantizeSettings:
        """As the quantizer takes them. Raises UsageError."""
        from qwenkit.quantize.settings import QuantizeSettings, Rule

        return QuantizeSettings(
            method=self.method,
            bits=self.bits,
            group_size=self.group_size,
            damp=self.damp,
            act_order=self.act_order,
            symmetric=self.symmetric,
            rules=tuple(Rule.parse(each) for each in self.rule or ()),
        )


@grouped
def command(
    model: Model = None,
    out: Out = None,
    *,
    given: QuantizeOptions,
    judged: quality.JudgeOptions,
    force: Force = False,
    speed: Speed = True,
    shard_size: ShardSize = "5GB",
    threads: options.Threads = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    model_name_or_path: ModelFlag = None,
    out_path: OutFlag = None,
) -> None:
    """Write a model in fewer bits, and a sheet of what that cost.

    Layer by layer, with no more than one layer's weights in memory as numbers. Every eighth row of
    the data is kept for judging unless --text is given. What was ended goes on when the same
    command is given again, to the same bytes; what is beyond the limits is refused unless --force
    is given. The result is read by qwenkit, transformers, GPTQModel, AutoAWQ and vLLM.

    \b
    Examples:
      qwenkit quantize ./model ./model-gptq --data chats.jsonl
      qwenkit quantize ./model ./model-awq --method awq --data book.txt --text other.txt
      qwenkit quantize ./model ./model-mixed --data chats.jsonl --rule 'down_proj=8'
      qwenkit quantize --model_name_or_path ./model --data_path chats.json --out_path ./out \\
        --bits 4 --group-size 128 --max_len 8192
    """
    name = options.one_of({"MODEL": model, "--model_name_or_path": model_name_or_path})
    target = options.one_of({"OUT": out, "--out_path": out_path})
    if name is None or target is None:
        raise UsageError("Give the model and the folder to write: qwenkit quantize MODEL OUT …")
    options.check_names_a_hub(name, {"--revision": revision})
    # torch, once imported, takes large pages: a tenth of the time went into clearing small ones
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    settings, limits = given.settings(), judged.limits()
    with download.bars() as bars:
        path = resolve(name, offline=offline, revision=revision, progress=bars)
    from qwenkit.save import read_shard_size  # torch takes seconds that --help does without

    job = _Job(name, path, Path(target), settings, limits, read_shard_size(shard_size), threads)
    sheet = job.run(given, judged, force=force, speed=speed)
    console.say(sheet.to_markdown(), end="")


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    name: str
    path: Path
    out: Path
    settings: QuantizeSettings
    limits: Limits
    shard_bytes: int
    threads: int | None

    def run(
        self,
        given: QuantizeOptions,
        judged: quality.JudgeOptions,
        *,
        force: bool,
        speed: bool,
    ) -> Sheet:
        import torch

        from qwenkit.quantize.calibrate import read_rows
        from qwenkit.quantize.judge import judge, publish
        from qwenkit.quantize.run import quantize
        from qwenkit.quantize.stream import LayerSource

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        start = time.monotonic()
        source = LayerSource(_opened(self.path, given.pad_for_tp, self.settings))
        rows = read_rows(
            given.data or (),
            judged.text or (),
            source.tokenizer,
            source.record,
            most_rows=given.rows,
            most_tokens=given.max_len,
        )
        with torch.inference_mode():
            with _steps(f"{self.name}, {self.settings.method}") as told:
                work, results = quantize(
                    source, rows, self.settings, self.out, shard_bytes=self.shard_bytes, told=told
                )
            with console.progress(f"Comparing {self.out} with {self.name} …") as show:
                sheet = judge(
                    work, results, source, rows, self.settings, limits=self.limits, told=show
                )
        sheet.seconds = time.monotonic() - start
        if speed:
            from qwenkit.bench.writing import writing_speed

            with console.busy("Measuring how fast it writes …"):
                sheet.tokens_per_second = {
                    "one stream": writing_speed(work.result, threads=self.threads)
                }
        publish(work, sheet, force=force)
        return sheet


def _opened(path: Path, pad_for_tp: int | None, settings: QuantizeSettings) -> Checkpoint:
    """The model to quantize, padded where that is asked for: what is done is said."""
    from qwenkit.checkpoint import open_checkpoint
    from qwenkit.padding import pad_for_tensor_parallel

    checkpoint = open_checkpoint(path)
    if pad_for_tp is None:
        return checkpoint
    size = settings.to_json()["group_size"] or 64  # of nf4 and int8, which have their own
    padded = pad_for_tensor_parallel(checkpoint, pad_for_tp, group_size=size if size > 0 else 32)
    for line in padded.said(pad_for_tp):
        console.note(line)
    return padded.checkpoint


@contextmanager
def _steps(title: str) -> Iterator[Callable[[Step], None]]:
    """A bar with the last matrix and its error; a line for each layer where nobody watches."""
    if not sys.stderr.isatty():
        yield _Lines(title)
        return
    from qwenkit.cli.bench_tables import ProgressBar  # rich is slow to import

    with ProgressBar() as bar:
        bar(title, 0.0)

        def told(step: Step) -> None:
            made = step.result
            bar(title if made is None else f"{made.path} {made.error:.2%}", step.share)

        yield told


class _Lines:
    """Notes to standard error: of each layer the mean of its matrices' errors and the largest."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._made: list[MatrixResult] = []

    def __call__(self, step: Step) -> None:
        if step.result is not None:
            self._made.append(step.result)
        elif self._made:
            worst = max(self._made, key=lambda result: result.error)
            mean = sum(result.error for result in self._made) / len(self._made)
            console.note(
                f"{self._title}: {step.share:.0%}, mean error {mean:.2%}, {worst.path} "
                f"{worst.error:.2%}"
            )
            self._made.clear()
