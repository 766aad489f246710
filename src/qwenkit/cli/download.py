"""Bars for downloads, on standard error and only where a person watches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qwenkit.cli import console

if TYPE_CHECKING:
    from qwenkit.checkpoint.progress import Progress, ProgressCallback


@contextmanager
def bars() -> Iterator[ProgressCallback | None]:
    """A callback that shows one bar for each file; None when nobody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as rich_progress  # slow to import, and only needed here
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(binary_units=True),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as shown:
        tasks: dict[str, rich_progress.TaskID] = {}

        def show(step: Progress) -> None:
            if step.file not in tasks:
                tasks[step.file] = shown.add_task(
                    console.visible(step.file), total=step.total_bytes, completed=step.done_bytes
                )
            shown.update(tasks[step.file], completed=step.done_bytes)

        yield show
