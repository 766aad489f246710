"""What a kind of KV cache costs and changes: the table, and the command that prints it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from typer.testing import CliRunner

from qwenkit.bench.kv import KvSettings, measure_kv
from qwenkit.cli.main import app
from qwenkit.errors import UsageError
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import Loaded, load
from tiny import write_tiny_checkpoint

IDS = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("kv") / "tiny")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder)


def test_the_rows_are_what_the_model_gives(loaded: Loaded) -> None:
    table = measure_kv(loaded, IDS, KvSettings(tokens=280), text="t")
    assert [row.kind for row in table.rows] == ["fp32", "bf16", "int8", "int4"]
    rows = {row.kind: row for row in table.rows}
    per_head = {"fp32": 32, "bf16": 16, "int8": 12, "int4": 20}  # heads of eight numbers
    for kind, row in rows.items():
        assert row.bytes_per_token == 2 * 2 * 2 * per_head[kind]
        assert row.wider_layers == 0
    with torch.inference_mode():
        logits = loaded.model(torch.tensor(IDS[:280]), PackedCausal([280]))
    expected = functional.cross_entropy(logits[:-1], torch.tensor(IDS[1:280])).exp().item()
    assert rows["fp32"].perplexity == pytest.approx(expected, rel=1e-4)
    assert (rows["bf16"].mean_kl, rows["bf16"].agreement) == (0.0, 1.0)
    assert 0 < rows["fp32"].mean_kl < 0.01
    assert rows["int8"].mean_kl < rows["int4"].mean_kl
    assert rows["int4"].agreement < rows["int8"].agreement <= 1


def test_what_cannot_be_measured_is_refused(loaded: Loaded) -> None:
    with pytest.raises(UsageError, match=r"^kind: got 'int3'"):
        KvSettings(kinds=("int3",))
    with pytest.raises(UsageError, match=r"^tokens: expected at least 2"):
        KvSettings(tokens=1)
    with pytest.raises(UsageError, match=r"^tokens: 400 were asked for; the text has 300"):
        measure_kv(loaded, IDS, KvSettings(tokens=400), text="t")


def test_the_command_prints_a_table_or_json(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some words of a text " * 10)
    arguments = ["bench", "kv", str(text), "--model", str(folder), "--tokens", "100"]
    result = CliRunner().invoke(app, [*arguments, "--kind", "int4", "--kind", "bf16", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [row["kind"] for row in data["rows"]] == ["int4", "bf16"]
    assert (data["text"], data["tokens"], data["guarded"]) == ("a.txt", 100, True)
    plain = CliRunner().invoke(app, [*arguments, "--no-guard", "--compute", "reference"])
    assert plain.exit_code == 0, plain.output
    assert "keys not guarded" in plain.stdout
    assert "| int8 | 96 | 0 |" in plain.stdout
