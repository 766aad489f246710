"""Rows 1 and 2 of the reliability board: thousands of damaged files, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = 2000
MEMORY_BYTES = 64 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads its own memory from /proc")
@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_damaged_files_are_refused_or_read_as_they_say(kind: str, tmp_path: Path) -> None:
    program = Path(__file__).with_name("mutate.py")
    command = [sys.executable, "-W", "error", str(program), kind, str(COUNT), "1", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"died with {done.returncode}: {done.stderr[-2000:]}"
    report = json.loads(done.stdout)
    assert report["faults"] == []
    assert report["growth_bytes"] <= MEMORY_BYTES
    # The damage must reach deep: many kinds of refusal, and enough files that still load.
    tally = report["tally"]
    assert sum(tally.values()) == COUNT
    assert sum(n for what, n in tally.items() if what.startswith("loaded")) >= 100
    assert sum(n for what, n in tally.items() if what.startswith("refused")) >= 1000
    assert report["kinds"] >= 25
    if kind == "gguf":  # and it must reach the tokenizer and the architecture of a whole model
        assert tally["loaded check_loading"] >= 40
        assert tally["refused TokenizerError"] >= 5
        assert tally["refused ConfigError"] >= 1
