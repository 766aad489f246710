"""`qwenkit quantize` and `qwenkit compare` from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quantized_made import DENSE, write_conversations
from qwenkit.cli.main import app
from tiny import write_tiny_checkpoint

runner = CliRunner()
LOOSE = ("--limit", "1e6", "--limit-kl", "1e6")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("quantize")
    model = write_tiny_checkpoint(folder / "model", config=DENSE)
    return model, write_conversations(folder / "chats.jsonl")


def run(*arguments: object) -> Any:
    return runner.invoke(app, [str(argument) for argument in arguments])


def test_a_model_is_quantized_and_compared(made: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = made
    out = tmp_path / "out"
    done = run("quantize", model, out, "--data", data, "--group-size", 32, *LOOSE)
    assert done.exit_code == 0, done.output
    assert "# out beside model" in done.stdout
    assert "tokens per second, one stream" in done.stdout
    sheet = json.loads((out / "quality.json").read_text())
    assert sheet["settings"]["method"] == "gptq"
    assert sheet["calibration"]["rows"] == 21
    assert (out / "quality.md").read_text() == done.stdout
    shown = run("compare", model, out, "--text", data, "--json", *LOOSE)
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["kl"] > 0
    again = run("compare", model, out, *LOOSE)
    assert "random ones, for no text was given" in again.stdout
    answer = run("generate", out, "--prompt", "x", "--max-tokens", 3, "--json")
    assert answer.exit_code == 0, answer.output


def test_the_flags_of_the_original_script_are_taken(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = made
    out = tmp_path / "out"
    done = run(
        *("quantize", "--model_name_or_path", model, "--data_path", data, "--out_path", out),
        *("--max_len", 64, "--bits", 4, "--group-size", 32, "--no-speed", *LOOSE),
    )
    assert done.exit_code == 0, done.output
    block = json.loads((out / "quantize_config.json").read_text())
    assert {k: block[k] for k in ("bits", "group_size", "damp_percent", "desc_act", "sym")} == {
        "bits": 4,
        "group_size": 32,
        "damp_percent": 0.01,
        "desc_act": False,
        "sym": True,
    }
    twice = run("quantize", model, out, "--model_name_or_path", "other", "--data", data)
    assert twice.exit_code == 2
    assert "give one" in twice.output


def test_what_is_refused_is_written_by_force(made: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = made
    out = tmp_path / "out"
    given = ("quantize", model, out, "--data", data, "--bits", 2, "--group-size", 32, "--no-speed")
    refused = run(*given)
    assert refused.exit_code == 1
    assert "refused, for" in refused.output
    assert not out.exists()
    forced = run(*given, "--force")
    assert forced.exit_code == 0, forced.output
    assert "written by --force" in forced.stdout
    assert run("compare", model, out, "--text", data).exit_code == 1


def test_rounding_needs_no_data(made: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = made
    out = tmp_path / "out"
    given = ("quantize", model, out, "--method", "rtn", "--group-size", 32, "--no-speed")
    done = run(*given, "--rule", "down_proj=8", "--no-symmetric")
    assert done.exit_code == 0, done.output
    assert "random ones" in done.stdout
    assert json.loads((out / "quality.json").read_text())["own_perplexity"] is None


def test_a_width_is_padded_first(made: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = made
    out = tmp_path / "out"
    given = ("quantize", model, out, "--data", data, "--group-size", 32, "--no-speed", *LOOSE)
    done = run(*given, "--pad-for-tp", 4)
    assert done.exit_code == 0, done.output
    assert "intermediate_size: 96 wide, padded to 128." in done.stderr
    config = json.loads((out / "config.json").read_text())
    assert config["intermediate_size"] == 128
    assert config["quantization_config"]["group_size"] == 32
    unlike = run("compare", model, out, *LOOSE)
    assert "pad the other too: qwenkit export" in unlike.output
    padded = tmp_path / "padded"
    run("export", model, padded, "--folder", "--pad-for-tp", 4, "--group-size", 32)
    assert run("compare", padded, out, "--text", data, *LOOSE).exit_code == 0


def test_published_figures_stand_beside_a_comparison(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    parent = tmp_path / "Qwen2-0.5B-Instruct"
    parent.symlink_to(made[0])
    shown = run("compare", parent, made[0], *LOOSE)
    assert shown.exit_code == 0, shown.output
    assert (
        "Published, on other machines:\nQwen2-0.5B-Instruct: Qwen2 Instruct in BF16" in shown.stdout
    )
    assert "  GPTQ-Int4: average 29.7%, MMLU 33.0%, C-Eval 39.2%" in shown.stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("quantize",), "Give the model and the folder to write"),
        (("quantize", "{model}", "{out}"), "gptq needs text to calibrate on"),
        (("quantize", "{model}", "{out}", "--method", "gptp"), "Did you mean 'gptq'"),
        (("quantize", "{model}", "{out}", "--rule", "x=y"), "rule: got 'x=y'"),
        (("quantize", "{model}", "{out}", "--limit", "0"), "perplexity_rise: got 0"),
        (("quantize", "{model}", "{model}", "--method", "rtn"), "is there already"),
        (("quantize", "{model}", "{out}", "--shard-size", "much"), "shard size: got 'much'"),
    ],
)
def test_what_cannot_be_is_said(
    made: tuple[Path, Path], tmp_path: Path, given: tuple[str, ...], message: str
) -> None:
    places = {"model": str(made[0]), "out": str(tmp_path / "out")}
    done = run(*(part.format(**places) for part in given))
    assert done.exit_code == 2
    assert message in done.output


def test_a_killed_program_goes_on_to_the_same_bytes(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = made

    def command(out: Path) -> list[str]:
        given = ["quantize", str(model), str(out), "--data", str(data), "--group-size", "32"]
        return [sys.executable, "-m", "qwenkit", *given, "--no-speed", "--threads", "1", *LOOSE]

    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run(command(whole), check=True, capture_output=True)
    work = tmp_path / "out.partial"
    first = work / "layer-0000.safetensors"
    with subprocess.Popen(command(out), stdout=-3, stderr=-3) as started:
        while started.poll() is None and not first.exists() and not out.exists():
            time.sleep(0.002)
        if started.poll() is None:
            os.kill(started.pid, signal.SIGKILL)
    subprocess.run(command(out), check=True, capture_output=True)
    for file in whole.iterdir():
        if not file.name.startswith("quality"):  # which says how long it took
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert not work.exists()
