"""A bar for long work that a script waits for: the one thing that this room shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from qwenkit.errors import UsageError


class Advance(Protocol):
    """Called with each request that has ended, and the tokens that it has said."""

    def __call__(self, tokens: int) -> None: ...


@contextmanager
def bar(requests: int, shown: object) -> Iterator[Advance]:
    """A bar over `requests` requests on standard error, with tokens a second; `shown` None: if
    there are several and a person looks on, a terminal or a notebook.

    Raises UsageError for what is neither None nor true nor false.
    """
    if shown is not None and not isinstance(shown, bool):
        raise UsageError(f"progress: expected true, false or none, got {shown!r}.")
    if shown is False or (shown is None and requests < 2):
        yield lambda tokens: None
        return
    from rich.console import Console  # a tenth of a second that one answer does without
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if shown is None and not (console.is_terminal or console.is_jupyter):
        yield lambda tokens: None
        return
    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Requests", total=requests, rate=0.0)
        said = 0

        def advance(tokens: int) -> None:
            nonlocal said
            said += tokens
            elapsed_s = progress.tasks[0].elapsed or 0.0
            progress.update(task, advance=1, rate=said / elapsed_s if elapsed_s else 0.0)

        yield advance
