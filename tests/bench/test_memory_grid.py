"""What `bench memory` measures is what the plan predicts, and an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qwenkit.bench import memory, shapes
from qwenkit.bench.memory import Grid, MemoryReport, measure_memory, new_report, read_report
from qwenkit.bench.memory_worker import Measured, Task
from qwenkit.bench.random_model import write_random_folder
from qwenkit.cli.main import app
from qwenkit.errors import CheckpointError, QwenkitError

SMALL: Mapping[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1536,
    "vocab_size": 20000,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
}


def grid(cache: Path, *, users: tuple[int, ...] = (1, 2)) -> Grid:
    return Grid(
        shapes=("small",), weights=("int8",), users=users, tokens=(64,), threads=1, cache=cache
    )


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """No process is started: each answers with a megabyte for each token."""
    done: list[Task] = []

    def measure(task: Task) -> Measured:
        done.append(task)
        return Measured(10**6, task.users * task.tokens * 10**6, 7, 8)

    monkeypatch.setattr(memory, "measure", measure)
    monkeypatch.setattr(memory, "measure_process", lambda vocab_size, threads: 10**7)
    monkeypatch.setattr(shapes, "SHAPES", {**shapes.SHAPES, "small": SMALL})
    return done


def test_prediction_and_measurement_agree_for_a_small_model(tmp_path: Path) -> None:
    write_random_folder(tmp_path / "model", SMALL)
    process_bytes = memory.measure_process(SMALL["vocab_size"], 1)
    task = Task(model=str(tmp_path / "model"), weights="int8", users=4, tokens=512, threads=1)
    predicted = memory.predict(SMALL, task, process_bytes=process_bytes)
    measured = memory.measure(task)
    # Of so small a model most is the process's own, which differs by machine.
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.08)
    assert measured.anonymous_bytes + measured.file_bytes <= measured.running_bytes


def test_a_grid_goes_on_where_it_was(tmp_path: Path, counted: list[Task]) -> None:
    file = tmp_path / "memory.json"
    states: list[MemoryReport] = []

    def save(report: MemoryReport) -> None:
        states.append(report)
        memory.write_report(file, report)

    empty = new_report(grid(tmp_path), "qwenkit bench memory")
    measure_memory(grid(tmp_path, users=(1,)), empty, save=save)
    again = read_report(file, empty)
    assert again == states[-1]
    whole = measure_memory(grid(tmp_path), again, save=save)
    assert [(t.users, t.tokens) for t in counted] == [(1, 64), (2, 64)]
    assert [len(state.cells) for state in states] == [1, 2]
    cell = whole.cells[1]
    assert cell.measured.peak_bytes == 128 * 10**6
    assert cell.error == cell.predicted.peak_bytes / (128 * 10**6) - 1
    written = json.loads(file.read_text())
    assert written["cells"][1]["error"] == cell.error
    assert written["cells"][1]["predicted"]["process_bytes"] == 10**7


def test_a_report_of_another_machine_is_not_continued(tmp_path: Path, counted: list[Task]) -> None:
    file = tmp_path / "memory.json"
    empty = new_report(grid(tmp_path), "")
    memory.write_report(file, replace(empty, machine="another"))
    with pytest.raises(CheckpointError, match="was measured on"):
        read_report(file, empty)
    file.write_text("{}")
    with pytest.raises(CheckpointError, match="no report of bench memory"):
        read_report(file, empty)


def test_a_process_that_fails_is_named(tmp_path: Path) -> None:
    task = Task(model=str(tmp_path / "none"), weights="int8", users=1, tokens=8, threads=1)
    with pytest.raises(QwenkitError, match=r"process that measures memory failed: .*no existing"):
        memory.measure(task)


def test_the_command_prints_what_it_measures(tmp_path: Path, counted: list[Task]) -> None:
    runner = CliRunner(env={"XDG_CACHE_HOME": str(tmp_path), "COLUMNS": "120", "NO_COLOR": "1"})
    how = ["--shape", "small", "--weights", "int8", "--users", "2", "--tokens", "64"]
    out = str(tmp_path / "memory.json")
    done = runner.invoke(app, ["bench", "memory", *how, "--out", out, "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["cells"] == json.loads(Path(out).read_text())["cells"]
    done = runner.invoke(app, ["bench", "memory", *how, "--out", out])
    assert "small int8" in done.stdout
    assert "128" in done.stdout
    assert len(counted) == 1
    done = runner.invoke(app, ["bench", "memory", "--shape", "huge"])
    assert "shape: got 'huge'" in done.stderr
    done = runner.invoke(app, ["bench", "memory", "--weights", "int5"])
    assert "--weights: got 'int5'" in done.stderr
