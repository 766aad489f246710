"""The Python that the guides show runs as it stands, on a tiny model in place of the default."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tiny import write_tiny_checkpoint

DOCS = Path(__file__).parents[2] / "docs"


def test_constrained_decoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "constrained-decoding.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    model = write_tiny_checkpoint(tmp_path / "model")
    names: dict[str, object] = {}
    exec(block.replace('"default"', repr(str(model))), names)
    lines = capsys.readouterr().out.rstrip("\n")
    written, _, chosen = lines.rpartition("\n")
    assert chosen in ("yes", "no")
    assert sorted(json.loads(written)) == ["age", "name"]
