"""`qwenkit plan`: a table for people, lines for a pipe, one JSON object for programs."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from qwenkit.cli import console
from qwenkit.cli.main import app

NAME = "Qwen/Qwen2-7B-Instruct"
GIB = 2**30


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """On a machine of 16 GiB, 12 of them free, where an empty process takes a quarter of one."""
    monkeypatch.setattr(
        "qwenkit.survey.doctor_machine.machine_memory", lambda: (16 * GIB, 12 * GIB)
    )
    monkeypatch.setattr("qwenkit.bench.memory.measure_process", lambda size, threads: GIB // 4)
    return CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"})


def test_a_pipe_gets_a_line_for_each_way(run: CliRunner) -> None:
    done = run.invoke(app, ["plan", NAME, "--offline", "--users", "4", "--tokens", "8192"])
    assert done.exit_code == 0, done.stderr
    first, work, *rows, free, step = done.stdout.splitlines()
    assert "7.62 billion parameters, stored as BF16, up to 32,768 tokens" in first
    assert "the table of published models" in first
    assert work == "For 4 users, each with 8,192 tokens, in GiB:"
    assert [row.split(";")[0].split()[-1] for row in rows] == ["auto", "int8", "int4", "fp32"]
    assert ["*" in row for row in rows] == [False, True, False, False]
    assert re.search(r"weights 7\.20; KV 1\.75; .* fits yes;", rows[1])
    assert "fits no; longest 0; users 0" in rows[3]
    assert free == "Free on this machine: 12.00 of 16.00 GiB."
    assert step == f"Next: LLM('{NAME}', weights='int8', kv_cache_tokens=32832)"


def test_a_terminal_gets_a_table(run: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "is_watched", lambda: True)
    done = run.invoke(app, ["plan", NAME, "--offline"])
    assert done.exit_code == 0, done.stderr
    assert re.search(r"\* int8 +8\.13 +7\.20 +0\.22 ", done.stdout)
    assert done.stdout.rstrip().endswith(f"Next: qwenkit chat {NAME} --weights int8 --context 4096")


def test_json_is_what_programs_were_promised(run: CliRunner) -> None:
    done = run.invoke(
        app, ["plan", NAME, "--offline", "--weights", "int4", "--devices", "2", "--json"]
    )
    told = json.loads(done.stdout)
    assert list(told) == [
        "name", "origin", "architecture", "storage", "parameters", "context_tokens",
        "download_bytes", "available_bytes", "machine_bytes", "work", "rows", "recommended", "next",
    ]  # fmt: skip
    assert set(told["work"]) == {"users", "tokens", "kv_dtype", "threads"}
    (row,) = told["rows"]
    assert list(row) == [
        "weights", "bits_per_weight", "memory", "fits", "longest_tokens", "most_users", "stages",
        "advice",
    ]  # fmt: skip
    memory = row["memory"]
    assert list(memory) == [
        "process_bytes", "weight_bytes", "kv_bytes", "activation_bytes", "loading_bytes",
        "running_bytes", "peak_bytes",
    ]  # fmt: skip
    parts = ("process_bytes", "weight_bytes", "kv_bytes", "activation_bytes")
    assert memory["running_bytes"] == sum(memory[part] for part in parts)
    assert [(s["first_layer"], s["end_layer"]) for s in row["stages"]] == [(0, 13), (13, 28)]


def test_devices_get_their_shares_and_padding_advice(run: CliRunner) -> None:
    how = ["--weights", "int4", "--group-size", "128", "--devices", "2"]
    done = run.invoke(app, ["plan", "Qwen/Qwen2-72B", "--offline", *how])
    assert "int4, device 0: layers 0 to 38, weights " in done.stdout
    assert "int4, device 1: layers 39 to 79, weights " in done.stdout
    assert (
        "intermediate_size 29,568 does not split evenly over 2 devices (231 units)" in done.stdout
    )
    assert "Padded with zeros to 29,696 it does." in done.stdout
    assert "Nothing fits: fewer users or tokens" in done.stdout


def test_longer_than_the_config_allows_is_said(run: CliRunner) -> None:
    done = run.invoke(app, ["plan", NAME, "--offline", "--tokens", "40000"])
    assert "40,000 tokens need --context" in done.stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--weights", "nf5"], "--weights: got 'nf5'"),
        (["--group-size", "64"], "--group-size: says something only together with --weights"),
        (["--head-weights", "int8"], "--head-weights: says something only together"),
        (["--kv-dtype", "int3"], "--kv-dtype: got 'int3'"),
        (["--users", "65"], "--users: got 65; one engine runs at most 64"),
        (["--tokens", "999999"], "--tokens: got 999999;"),
        (["--weights", "int8", "--devices", "60"], "--devices: got 60; a model of 28 layers"),
    ],
)
def test_options_that_cannot_be(run: CliRunner, given: list[str], message: str) -> None:
    done = run.invoke(app, ["plan", NAME, "--offline", *given])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"Error: {message}")
    assert done.stdout == ""


def test_names_that_lead_nowhere(run: CliRunner) -> None:
    done = run.invoke(app, ["plan", "Some/Model", "--offline"])
    assert done.exit_code == 1
    assert "not in the table of published Qwen models" in done.stderr
    done = run.invoke(app, ["plan", "Qwen2-7B"])
    assert "Did you mean 'Qwen/Qwen2-7B'?" in done.stderr
