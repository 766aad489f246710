"""Rows that are tests of the source tree already: they are run as they stand, and counted."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from qwenkit.bench.process import run_program
from qwenkit.bench.reliability.board import Board
from qwenkit.bench.reliability.spec import Row, Tally

_TIMEOUT_S = 600.0


def row_of_tests(
    number: int, promise: str, *targets: str, quick_marks: str = "", environment: str = ""
) -> Row:
    """A row whose cases are pytest's; `targets` are files or tests, from the root of a checkout.

    `quick_marks` leaves tests out of the quick form, in pytest's words for marks; `environment` is
    the checkout's own one that runs them, where it is there.
    """

    async def run(board: Board, tally: Tally) -> None:
        marks = board.pick(quick_marks, "")
        await run_tests(board, tally, targets, marks=marks, environment=environment)

    return Row(id=number, promise=promise, run=run, needs_own_server=False)


async def run_tests(
    board: Board,
    tally: Tally,
    targets: tuple[str, ...],
    *,
    marks: str = "",
    environment: str = "",
) -> None:
    """Count the tests of `targets` into the tally; what is skipped is not counted, and where all of
    them are, the reason is given.
    """
    checkout = board.settings.checkout
    if checkout is None:
        tally.unavailable = "needs a source checkout: its cases are tests of the tree"
        return
    missing = [target for target in targets if not (checkout / target.split("::")[0]).exists()]
    if missing:
        tally.unavailable = f"this checkout has no {', '.join(missing)}"
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        own = checkout / environment / "bin" / "python"
        python = str(own) if environment and own.exists() else sys.executable
        command = ["env", "OMP_NUM_THREADS=1", python, "-m", "pytest", "-q", *targets, "-m", marks]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}", "-o", "addopts="]
        done = await asyncio.to_thread(run_program, command, cwd=checkout, timeout_s=_TIMEOUT_S)
        if not report.exists():
            tally.check("pytest", False, done)
            return
        _count(ElementTree.parse(report).getroot(), tally)


def _count(root: ElementTree.Element, tally: Tally) -> None:
    reasons: list[str] = []
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        skipped = case.find("skipped")
        if skipped is not None:
            tally.count("skipped")
            reasons.append((skipped.text or "").strip("()'"))
            continue
        wrong = next((e for e in case if e.tag in ("failure", "error")), None)
        detail = "" if wrong is None else wrong.get("message", "")
        tally.check(name, wrong is None, detail)
        tally.took(float(case.get("time", 0)))
    if reasons and not tally.total:
        tally.unavailable = reasons[0]
