"""`qwenkit info`: a table for people, one JSON object for programs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwenkit.cli import console
from qwenkit.cli.main import app


@pytest.fixture
def run() -> CliRunner:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_a_terminal_gets_a_table(
    run: CliRunner, default_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "is_watched", lambda: True)
    done = run.invoke(app, ["info", str(default_model_path)])
    rows = dict(re.findall(r"│ +([\w ]+?) +│ (.*?) +│", done.stdout))
    assert rows["architecture"] == "llama, gguf"


def test_a_pipe_gets_a_line_for_each_fact(run: CliRunner, default_model_path: Path) -> None:
    done = run.invoke(app, ["info", str(default_model_path)])
    assert done.exit_code == 0
    rows = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert rows["path"] == str(default_model_path)
    assert rows["architecture"] == "llama, gguf"
    assert rows["hidden_size"] == "576"
    assert rows["tie_word_embeddings"] == "yes"
    assert rows["parameters"] == "134,515,008 (134.52 million)"
    assert rows["without embeddings"] == "106,203,456 (106.20 million)"
    assert rows["bytes"] == "92.1 MiB: Q4_1 63.3 MiB, Q8_0 28.7 MiB, F32 137.2 KiB"
    assert rows["mlp"] == "47.5 MiB, 79,626,240 (79.63 million) parameters"
    assert rows["quantization"] == "Q4_1"
    assert rows["keys and values"] == "22.5 KiB a token"
    assert rows["context"] == "8,192 tokens"
    assert rows["tokenizer"] == "49,152 tokens"
    assert rows["chat format"] == "template"
    assert rows["stops"] == "'<|im_end|>' (2), '<|endoftext|>' (0)"
    assert rows["sampling"] == "temperature 0.2, top_p 0.9"
    assert rows["licence"] == "apache-2.0"


def test_json_holds_the_same(run: CliRunner, default_model_path: Path) -> None:
    done = run.invoke(app, ["info", str(default_model_path), "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["path"] == str(default_model_path)
    assert told["parameters"] == 134_515_008
    assert told["kv_bytes_per_token"] == 23_040
    assert told["stops"][0] == {"token_id": 2, "text": "<|im_end|>"}
    assert told["sampling"]["temperature"] == 0.2
    assert told["licence"] == "apache-2.0"
    assert "template" not in told
    assert len(told["record"]["chat_template"]) > 200
    assert sum(p["stored_bytes"] for p in told["parts"]) == told["stored_bytes"]


def test_a_name_that_leads_nowhere(run: CliRunner) -> None:
    done = run.invoke(app, ["info", "Qwen2-0.5B"])
    assert done.exit_code == 1
    assert "Did you mean 'Qwen/Qwen2-0.5B'?" in done.stderr
    assert done.stdout == ""


def test_a_file_that_is_no_model(run: CliRunner, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF but not really")
    done = run.invoke(app, ["info", str(file)])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: {file}")
    assert "Traceback" not in done.stderr
