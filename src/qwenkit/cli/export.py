"""`qwenkit export`: a model as one GGUF file for llama.cpp and its kin, or as a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenkit.checkpoint.hub import resolve
from qwenkit.cli import console, download, options
from qwenkit.cli import quality_options as quality
from qwenkit.cli.grouped import grouped
from qwenkit.errors import UsageError, suggest

if TYPE_CHECKING:
    from qwenkit.checkpoint.imatrix import Imatrix
    from qwenkit.quantize.gguf_export import Exported
    from qwenkit.quantize.stream import LayerSource

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Name on the hub, folder or file.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The file or folder to write.")]
Gguf = Annotated[
    str | None,
    typer.Option(
        "--gguf",
        metavar="TYPE",
        help="q4_k_m, q5_k_m, q6_k, q8_0, q4_0 …, or bf16, f16, f32.",
        show_default=False,
    ),
]
ImatrixFile = Annotated[
    Path | None,
    typer.Option(
        "--imatrix",
        metavar="FILE",
        help="Round by an importance matrix: of llama-imatrix (GGUF or .dat) or --save-imatrix.",
        show_default=False,
    ),
]
Calibrate = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibrate",
        metavar="FILE",
        help="Round by an importance matrix computed from this: plain text, conversations of "
        'fine-tuning or {"text"} lines; may be given several times.',
    ),
]
SaveImatrix = Annotated[
    Path | None,
    typer.Option(
        "--save-imatrix",
        metavar="FILE",
        help="With --calibrate: keep the importance matrix, as llama-imatrix writes it.",
        show_default=False,
    ),
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceOptions:
    """What says how much each column counts; see `qwenkit.cli.grouped`."""

    imatrix: ImatrixFile = None
    calibrate: Calibrate = None
    rows: quality.Rows = 128
    max_len: quality.MaxLen = None
    save_imatrix: SaveImatrix = None

    def check(self, gguf: str | None) -> None:
        """Raises UsageError for options that do not go together."""
        named = {"--imatrix": self.imatrix, "--calibrate": self.calibrate}
        given = [name for name, value in named.items() if value]
        if len(given) > 1:
            raise UsageError("--imatrix and --calibrate: give one of them.")
        if given and gguf is None:
            raise UsageError(f"{given[0]}: only for --gguf.")
        if self.save_imatrix is not None and not self.calibrate:
            raise UsageError("--save-imatrix: only with --calibrate.")


AsFolder = Annotated[
    bool,
    typer.Option("--folder", help="Write a folder of safetensors instead of a GGUF file."),
]
PadForTp = Annotated[
    int | None,
    typer.Option(
        "--pad-for-tp",
        metavar="N",
        min=1,
        help="With --folder: widen the feed-forward parts by zeros, so that N devices share them.",
        show_default=False,
    ),
]
PadGroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        min=1,
        help="With --pad-for-tp: columns that stay together. [default: that of the file, or 128]",
        show_default=False,
    ),
]


@grouped
def command(
    model: Model,
    out: Out,
    *,
    gguf: Gguf = None,
    importance: ImportanceOptions,
    folder: AsFolder = False,
    pad_for_tp: PadForTp = None,
    group_size: PadGroupSize = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
) -> None:
    """Write a model as one GGUF file with all that llama.cpp needs, or as a folder.

    TYPE is a mixture of llama.cpp: most matrices have the type of its name, those where an error
    costs more a better one, by llama.cpp's own rules and with the very bytes that it would write.
    A matrix whose rows are no whole blocks of 256 gets the type that llama.cpp falls back to.
    The model may be of any format; its tensors pass through the memory one part at a time.

    --pad-for-tp makes intermediate_size a multiple of N group sizes, which engines need that split
    a model over N devices; the added numbers are zeros, and the model says the same.

    \b
    Examples:
      qwenkit export Qwen/Qwen2-0.5B-Instruct qwen2.gguf --gguf q4_k_m
      qwenkit export ./my-model my-model.gguf --gguf bf16
      qwenkit export ./my-model my-model.gguf --gguf iq4_xs --calibrate chats.jsonl
      qwenkit export ./my-model my-model.gguf --gguf q4_0 --imatrix my-model.imatrix.gguf
      qwenkit export ./my-model ./padded --folder --pad-for-tp 8
    """
    options.check_names_a_hub(model, {"--revision": revision})
    from qwenkit.quantize.gguf_scheme import SCHEMES  # torch: seconds that --help does without

    _check(gguf, folder, SCHEMES, pad_for_tp=pad_for_tp, group_size=group_size)
    importance.check(gguf)
    if out.exists() and gguf is not None:
        raise UsageError(f"OUT: {str(out)!r} is there already; remove it, or name another.")
    given = None
    if importance.imatrix is not None:
        from qwenkit.checkpoint.imatrix import read_imatrix

        given = read_imatrix(importance.imatrix)
    with download.bars() as bars:
        path = resolve(model, offline=offline, revision=revision, progress=bars)
    if gguf is None:
        _write_folder(path, out, pad_for_tp, group_size)
        return
    _write_gguf(path, out, gguf, importance, given)


def _write_gguf(
    path: Path, out: Path, gguf: str, importance: ImportanceOptions, given: Imatrix | None
) -> None:
    from qwenkit.kernels.cpu import register
    from qwenkit.quantize.gguf_export import export_gguf
    from qwenkit.quantize.stream import LayerSource

    register()
    source = LayerSource(path)
    if importance.calibrate:
        given = _calibrated(source, importance)
    with console.progress(f"Writing {out} …") as show:
        file = importance.imatrix or importance.save_imatrix
        done = export_gguf(
            source,
            out,
            gguf,
            imatrix=given,
            imatrix_file="" if file is None else str(file),
            progress=show,
        )
    for line in _report(done):
        console.say(line)


def _calibrated(source: LayerSource, given: ImportanceOptions) -> Imatrix:
    from qwenkit.checkpoint.imatrix import write_imatrix
    from qwenkit.quantize.calibrate import read_rows
    from qwenkit.quantize.importance import compute_imatrix

    files = given.calibrate or []
    shown = read_rows(
        files,
        files,  # nothing is kept back: nothing is judged
        source.tokenizer,
        source.record,
        most_rows=given.rows,
        most_tokens=given.max_len,
    )
    with console.progress("Computing the importance matrix …") as show:
        dataset = ", ".join(file.name for file in files)
        made = compute_imatrix(source, shown.calibration, dataset=dataset, progress=show)
    if given.save_imatrix is not None:
        write_imatrix(made, given.save_imatrix)
    return made


def _check(
    gguf: str | None,
    folder: bool,
    schemes: Collection[str],
    *,
    pad_for_tp: int | None,
    group_size: int | None,
) -> None:
    """Raises UsageError for options that do not go together."""
    if (gguf is not None) == folder:
        kinds = ", ".join(schemes)
        raise UsageError(f"Say what to write: --gguf TYPE, one of {kinds}; or --folder.")
    if gguf is not None and gguf.lower() not in schemes:
        raise UsageError(f"--gguf: got {gguf!r}. {suggest(gguf, schemes)}")
    if pad_for_tp is not None and not folder:
        raise UsageError("--pad-for-tp: only for --folder; llama.cpp splits any width.")
    if group_size is not None and pad_for_tp is None:
        raise UsageError("--group-size: only for --pad-for-tp.")


def _write_folder(source: Path, out: Path, pad_for_tp: int | None, group_size: int | None) -> None:
    from qwenkit.convert import export_folder

    with console.progress(f"Writing {out} …") as show:
        done = export_folder(
            source, out, pad_for_tp=pad_for_tp or 1, group_size=group_size, progress=show
        )
    count = len(done.weights)
    console.say(f"{out}: {count} file{'s' if count > 1 else ''} of weights.")
    if pad_for_tp is not None and done.padded is not None:
        for line in done.padded.said(pad_for_tp):
            console.say(line)


def _report(done: Exported) -> list[str]:
    types = ", ".join(f"{count} {tag}" for tag, count in done.storages.items())
    lines = [
        f"{done.path}: {done.size_bytes / 1e6:,.1f} MB of tensors, {done.bits_per_number:.2f} bits "
        f"a number: {types}."
    ]
    if done.smaller_blocks:
        lines.append(
            f"{len(done.smaller_blocks)} matrices have rows that are no whole blocks of the wanted "
            f"type and took llama.cpp's next one, such as {done.smaller_blocks[0]}."
        )
    if done.requantized:
        lines.append(
            f"{len(done.requantized)} matrices were quantized before and are rounded a second "
            "time; from the original weights the file would be better."
        )
    if done.without_importance:
        lines.append(
            f"{len(done.without_importance)} matrices have no entry in the importance matrix, such "
            f"as {done.without_importance[0]}."
        )
    return lines
