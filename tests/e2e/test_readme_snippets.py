"""The Python that the README and the engine's page show runs, with the model that they name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks(file: str) -> list[str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)


BLOCKS = [*blocks("README.md"), "\n".join(blocks("docs/engine.md"))]  # the page's go on
HANG_S = 300


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:40])
def test_a_snippet_runs(block: str, default_model_path: Path) -> None:
    assert default_model_path.is_file()  # what the snippets call "default"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or "print(" not in block
