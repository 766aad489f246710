"""What reaches the terminal: made harmless here, and nowhere written around this file.

The reply goes to standard output, everything said about it to standard error, so that a pipe
carries only the reply. Model output may hold any character; `visible` keeps it from moving the
cursor, setting the title or answering queries (ECMA-48 control functions).
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

# C0 controls and DEL have pictures in Unicode; C1 controls have none, and some terminals obey them.
_HARMLESS: dict[int, str | None] = {code: chr(0x2400 + code) for code in range(0x20)}
_HARMLESS |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
_HARMLESS |= {0x7F: "\u2421", ord("\r"): None}
del _HARMLESS[ord("\n")], _HARMLESS[ord("\t")]

# JSON lets these stand in a string, a terminal may obey them.
_JSON_ESCAPES = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}


def visible(text: str) -> str:
    """`text` with every control character but newline and tab made visible.

    A carriage return is left out: it would overwrite the line, and in "\\r\\n" it means nothing.
    Character by character, so a text may be given in pieces.
    """
    return text.translate(_HARMLESS)


class LogFormatter(logging.Formatter):
    """One harmless line of a log record."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def tolerate_narrow_encodings() -> None:
    """A terminal that cannot show a character gets "?", never an exception in mid-reply."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def is_typed() -> bool:
    """Standard input is a terminal at which a person types."""
    return sys.stdin is not None and sys.stdin.isatty()  # None: the program began with it closed


def is_watched() -> bool:
    """Standard output is a terminal that a person reads."""
    return sys.stdout is not None and sys.stdout.isatty()


def say(text: str, *, end: str = "\n") -> None:
    """Write to standard output at once."""
    typer.echo(visible(text) + end, nl=False)


def say_json(value: Any) -> None:
    """Write one JSON value as one line to standard output, exactly: what `say` would make visible
    is escaped inside its strings. Raises ValueError for NaN and infinities, which JSON lacks.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    typer.echo(text.translate(_JSON_ESCAPES))


def note(text: str) -> None:
    """A remark about what is going on, to standard error."""
    _to_stderr(visible(text), dim=True)


def error(text: str) -> None:
    """What went wrong, as one line on standard error."""
    _to_stderr(
        visible("Error: " + " ".join(line.strip() for line in text.splitlines())),
        fg=typer.colors.RED,
    )


def _to_stderr(text: str, *, dim: bool | None = None, fg: str | None = None) -> None:
    if os.environ.get("NO_COLOR"):
        typer.echo(text, err=True)
    else:
        typer.secho(text, err=True, dim=dim, fg=fg)


def clear_screen() -> None:
    """Empty the terminal; nothing when standard output is not one."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[2J\x1b[H")
        sys.stdout.flush()


@contextmanager
def busy(text: str) -> Iterator[None]:
    """Show on standard error, if a person watches it, that something long is under way."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # slow to import, and only needed here
    from rich.text import Text

    with Console(stderr=True).status(Text(visible(text))):
        yield


@contextmanager
def progress(text: str) -> Iterator[Callable[[float], None] | None]:
    """The same with a bar, to which the share done, 0 to 1, is told; None when nobody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as rich_progress  # slow to import, and only needed here
    from rich.console import Console

    columns = (
        rich_progress.SpinnerColumn(),
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(visible(text), total=None)
        yield lambda share: shown.update(task, total=1.0, completed=share)
