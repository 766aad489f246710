"""Writes docs/cli.md from the commands' own help: `make docs`. A test compares the two."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from qwenkit.cli.main import COMMANDS, app, load_command

_WIDTH = 100
_HEAD = """# The commands

Written by `make docs` from what `--help` says; do not edit it here.
"""


def cli_markdown() -> str:
    """The help of the program and of every command as one Markdown page."""
    sections = [_HEAD, _section("qwenkit", typer.main.get_command(app))]
    for name in COMMANDS:
        for title, command in _with_subcommands(f"qwenkit {name}", load_command(name)):
            sections.append(_section(title, command))
    return "\n".join(sections)


def _with_subcommands(title: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield title, command
    for name, below in getattr(command, "commands", {}).items():
        yield from _with_subcommands(f"{title} {name}", below)


def _section(title: str, command: Any) -> str:
    context = typer.Context(
        command,
        info_name=title,
        terminal_width=_WIDTH,
        max_content_width=_WIDTH,
        help_option_names=["-h", "--help"],
    )
    lines = [line.rstrip() for line in command.get_help(context).splitlines()]
    return "\n".join([f"## {title}", "", "```text", *lines, "```", ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(cli_markdown(), encoding="utf-8")
