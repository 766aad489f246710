"""Mapped files: what was read is let go, and comes back when it is read again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from qwenkit.checkpoint import open_checkpoint
from qwenkit.checkpoint.mapping import MappedFile
from qwenkit.formats.plan import WeightPlan
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import load
from tiny import CONFIG, tiny_tensors, write_tiny_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are let go on Linux only")


def resident_kb(file: Path) -> int:
    """Of the file's mappings in this process."""
    total, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            here = line.endswith(str(file))
        elif here and first == "Rss:":
            total += int(line.split()[1])
    return total


def test_views_outlive_the_release(tmp_path: Path) -> None:
    numbers = torch.arange(100_000, dtype=torch.float32)
    file = tmp_path / "numbers"
    file.write_bytes(numbers.numpy().tobytes())
    mapped = MappedFile(file)
    view = mapped.view("F32", (100_000,), 0)
    assert torch.equal(view, numbers)
    assert resident_kb(file) >= 390
    mapped.release()
    assert resident_kb(file) == 0
    assert torch.equal(view, numbers)


def test_every_tensor_of_a_file_releases_the_same(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, shard_bytes=20_000)
    tensors = open_checkpoint(folder).tensors.values()
    files, releases = {t.file for t in tensors}, {t.release for t in tensors}
    assert 1 < len(files) == len(releases)
    assert None not in releases


def test_a_file_whose_weights_were_packed_is_let_go(tmp_path: Path) -> None:
    config = CONFIG | {"hidden_size": 128, "intermediate_size": 512}
    folder = write_tiny_checkpoint(tmp_path, config=config, tensors=tiny_tensors(config))
    file = folder / "model.safetensors"
    packed = load(folder, plan=WeightPlan("fp32"))
    assert resident_kb(file) * 1024 < file.stat().st_size / 4  # norms, and what is read with them
    plain = load(folder)
    ids = torch.arange(9)
    logits = [m.model(ids, PackedCausal([9])) for m in (packed, plain)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
