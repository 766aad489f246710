"""Long measurements on disk: written down cell by cell, and gone on with after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from qwenkit.checkpoint.atomic import replacing
from qwenkit.errors import UsageError

Cells = TypeVar("Cells")


def read_cells(
    path: Path,
    conditions: Mapping[str, object],
    digests: Mapping[str, str],
    parse: Callable[[Any], Cells],
) -> Cells | None:
    """What `parse` makes of "cells" in the JSON file `path`; None where there is no such file.

    Raises UsageError for a file that was measured under other `conditions`, whose "digests" of
    model or text are others or missing, or that cannot be read.
    """
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = {key: data[key] for key in conditions}
        known = dict(data.get("digests", {}))
        cells = parse(data["cells"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"out: {str(path)!r} is no such table ({error!r}).") from error
    for key, value in found.items():
        given = json.loads(json.dumps(conditions[key]))
        if value != given:
            raise UsageError(
                f"out: {str(path)!r} was measured with {key} {value!r}, not {given!r}. "
                "Give another folder."
            )
    for key, digest in digests.items():
        if key not in known:
            raise UsageError(
                f"out: {str(path)!r} does not say which {key} it was measured with, as an earlier "
                "qwenkit wrote it. Give another folder."
            )
        if known[key] != digest:
            raise UsageError(
                f"out: {str(path)!r} was measured with another {key} of the same name. "
                "Give another folder."
            )
    return cells


def write_files(folder: Path, name: str, *, data: object, markdown: str, picture: str) -> None:
    """`name`.json, .md and .svg in `folder`, each whole or not at all."""
    contents = {"json": json.dumps(data, indent=1, ensure_ascii=False) + "\n"}
    contents |= {"md": markdown, "svg": picture}
    for kind, content in contents.items():
        with replacing(folder / f"{name}.{kind}") as file:
            file.write(content.encode())
