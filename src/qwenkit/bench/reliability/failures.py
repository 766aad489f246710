"""Inputs that once broke a promise, kept as files, so that every later run tries them again."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from qwenkit.bench.reliability.spec import Failure, as_json_can_hold
from qwenkit.checkpoint.atomic import replacing


def keep_failure(folder: Path, row: int, seed: int, failure: Failure) -> Path | None:
    """Write down what was given, under a name that the same input has again; None where the row
    gave no input.
    """
    if failure.given is None:
        return None
    given = as_json_can_hold(failure.given)
    key = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:10]
    words = re.sub(r"[^a-z0-9]+", "-", failure.case.lower()).strip("-")[:40]
    path = folder / f"row{row:02}-{words}-{key}.json"
    folder.mkdir(parents=True, exist_ok=True)
    for known in folder.glob(f"row{row:02}-*-{key}.json"):
        return known
    content = {"row": row, "seed": seed, "case": failure.case, "detail": failure.detail}
    with replacing(path) as file:
        file.write((json.dumps(content | {"given": given}, indent=1) + "\n").encode())
    return path


def kept_failures(folder: Path, row: int) -> list[tuple[str, Any]]:
    """Cases and inputs that once failed in this row, oldest name first; unreadable files are left
    out.
    """
    found = []
    for path in sorted(folder.glob(f"row{row:02}-*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found.append((f"again: {content['case']}", content["given"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found
