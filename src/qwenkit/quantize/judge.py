"""Whether a result may have its name: it is measured first, and what is beyond the limits stays in
the work folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qwenkit.errors import QualityError
from qwenkit.quantize.calibrate import Rows, random_rows
from qwenkit.quantize.compare import compare
from qwenkit.quantize.layer import MatrixResult
from qwenkit.quantize.report import Limits, Sheet, method_notes, write_sheet
from qwenkit.quantize.settings import QuantizeSettings
from qwenkit.quantize.stream import LayerSource
from qwenkit.quantize.work import WorkFolder

RANDOM_NOTE = "random ones, for no text was given"


def measure(
    parent: LayerSource,
    model: Path,
    judging: Sequence[Sequence[int]],
    note: str,
    *,
    limits: Limits,
    name: str,
    told: Callable[[float], None] | None = None,
) -> Sheet:
    """The sheet of the model at `model`, called `name`; by random tokens where there are no rows to
    judge by.
    """
    rows = judging or random_rows(parent.tokenizer)
    found = compare(
        parent,
        LayerSource(model),
        rows,
        is_text=bool(judging),
        told=told or (lambda share: None),
    )
    return Sheet(
        parent=parent.record.name,
        model=name,
        comparison=found,
        text=note if judging else RANDOM_NOTE,
        limits=limits,
    )


def judge(
    work: WorkFolder,
    results: Sequence[MatrixResult],
    source: LayerSource,
    rows: Rows,
    settings: QuantizeSettings,
    *,
    limits: Limits,
    told: Callable[[float], None] | None = None,
) -> Sheet:
    """The sheet of what was quantized in `work`; nothing is written."""
    sheet = measure(
        source, work.result, rows.judging, rows.note, limits=limits, name=work.out.name, told=told
    )
    sheet.settings = settings.to_json()
    if settings.needs_calibration:
        sheet.calibration = {"rows": len(rows.calibration), "tokens": rows.tokens}
    sheet.notes = method_notes(results, settings)
    if settings.method == "awq" and not settings.is_awq_layout:
        sheet.notes.append("AWQ's files have four bits only: these are in GPTQ's layout")
    return sheet


def publish(work: WorkFolder, sheet: Sheet, *, force: bool = False) -> None:
    """Give the result its name, with its sheet beside it.

    Raises QualityError where it is beyond the limits and not forced; the sheet then stands in the
    work folder.
    """
    reasons = sheet.refusals()
    if reasons and not force:
        write_sheet(work.path, sheet)
        told = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if reasons[3:] else "")
        raise QualityError(
            f"{work.out}: refused, for {told}. The sheet is {work.path}/quality.md. Give more "
            "bits, smaller groups or more data; or write it all the same with --force."
        )
    if reasons:
        sheet.notes.append("written by --force, though beyond the limits")
    write_sheet(work.result, sheet)
    work.publish()
