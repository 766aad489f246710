"""A peer of the bench that ends while it is measured."""

from __future__ import annotations

import sys
from pathlib import Path

# A peer that answers so many requests and then ends.
FAILING = """
import json, sys
print(json.dumps({{"version": "1"}}), flush=True)
for _ in range({answers}):
    sys.stdin.readline()
    print(json.dumps({{"seconds": 1.0, "peak_bytes": 5}}), flush=True)
{end}
"""


def failing_peer(folder: Path, answers: int, end: str) -> str:
    """The path of a Python that plays it: `end` is done after so many answers."""
    script = folder / "peer.py"
    script.write_text(FAILING.format(answers=answers, end=end))
    python = folder / "peer-python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -S {script}\n")
    python.chmod(0o755)
    return str(python)
