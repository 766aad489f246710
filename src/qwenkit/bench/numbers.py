"""Tables in a page of numbers: each is a section, which the next run of its command replaces."""

from __future__ import annotations

import re
from pathlib import Path

from qwenkit.checkpoint.atomic import replacing
from qwenkit.errors import UsageError


def write_section(path: Path, heading: str, content: str) -> None:
    """Put `content` under "## `heading`" in a Markdown file: in place of that section, or at the
    end. Raises UsageError where there is no such file, CheckpointError when it cannot be written.
    """
    if not path.is_file():
        raise UsageError(f"numbers: there is no file {str(path)!r}.")
    text = path.read_text(encoding="utf-8")
    section = f"## {heading}\n\n{content.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if pattern.search(text):
        new = pattern.sub(lambda _: f"{section}\n", text)
    else:
        new = f"{text.rstrip()}\n\n{section}"
    with replacing(path) as file:
        file.write((new.rstrip() + "\n").encode())
