"""`qwenkit figures`: what was published, for people and for programs."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from qwenkit.cli import figures
from qwenkit.cli.main import app


@pytest.fixture
def run() -> CliRunner:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_a_models_figures_have_setting_source_and_date(run: CliRunner) -> None:
    done = run.invoke(app, ["figures", "Qwen/Qwen-7B-Chat-Int4", "--topic", "speed"])
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0] == (
        "Qwen-7B-Chat: Speed of generating, in BF16 and GPTQ Int4 "
        "(1 A100-SXM4-80G, PyTorch 2.0.1, CUDA 11.4, batch 1, context 1)"
    )
    assert lines[1] == "  BF16, 2,048 generated: generating 30.34 tokens/s"
    assert lines[5].startswith("  README of QwenLM/Qwen, with Qwen-14B, 2023-09-25: https://")


def test_out_of_memory_and_contradictions_are_said(run: CliRunner) -> None:
    told = run.invoke(app, ["figures", "Qwen-7B-Chat"]).stdout
    assert "  cache in BF16, batch 64: peak memory out of memory\n" in told
    assert "\nContradiction 4: " in told
    assert "Contradiction 16" not in told


def test_without_a_model_all_are_listed(run: CliRunner) -> None:
    lines = run.invoke(app, ["figures", "--topic", "speed"]).stdout.splitlines()
    assert "Qwen2-0.5B-Instruct: 32 speed" in lines
    assert not any("quality" in line for line in lines)
    told = json.loads(run.invoke(app, ["figures", "--json"]).stdout)
    assert told["models"]["Qwen-1.8B"] == {"memory": 2, "training": 48}


def test_json_has_everything(run: CliRunner) -> None:
    told = json.loads(run.invoke(app, ["figures", "Qwen2-7B", "--json"]).stdout)
    assert told["model"] == "Qwen2-7B"
    one = next(f for f in told["figures"] if f["quantity"] == "parameters without embeddings")
    assert one == {
        "table": "sizes-2024",
        "title": "Parameters of base models",
        "topic": "size",
        "source": {
            "name": "card-qwen2",
            "title": "Model card of Qwen2-7B",
            "date": "2024-06-07",
            "address": "https://huggingface.co/Qwen/Qwen2-7B",
        },
        "model": "Qwen2-7B",
        "quantity": "parameters without embeddings",
        "unit": "billions",
        "value": 6.5,
        "setting": {},
    }


def test_contradictions_are_listed_with_both_sides(run: CliRunner) -> None:
    told = run.invoke(app, ["figures", "--contradictions"]).stdout
    assert told.startswith("1. The parameters of Qwen2-7B: 7.6 and 6.5 billion on the card, ")
    assert "   Qwen2-7B: parameters 7.07 billions (Hello Qwen2, 2024-06-07)\n" in told
    listed = json.loads(run.invoke(app, ["figures", "--contradictions", "--json"]).stdout)
    assert [side["value"] for side in listed["contradictions"][0]["sides"]] == [
        7.6,
        7.07,
        6.5,
        5.98,
    ]


def test_what_is_not_known_is_said(run: CliRunner) -> None:
    wrong = run.invoke(app, ["figures", "Qwen2-7B-Instruckt"])
    assert wrong.exit_code == 2
    assert "is known to be published of 'Qwen2-7B-Instruckt'. Did you mean" in wrong.stderr
    nothing = run.invoke(app, ["figures", "Qwen2-7B", "--topic", "speed"])
    assert "nothing about speed is known to be published of 'Qwen2-7B'. Leave" in nothing.stderr
    assert "Did you mean 'speed'" in run.invoke(app, ["figures", "--topic", "sped"]).stderr


def test_figures_stand_beside_what_was_measured() -> None:
    assert figures.beside("./my-model", "speed") == []
    lines = figures.beside("qwen2-0.5b", "speed")
    assert lines[0] == "Published, on other machines:"
    assert lines[1].startswith("Qwen2-0.5B-Instruct: Qwen2 Instruct generating 2,048 tokens")
    assert figures.beside("Qwen/Qwen2-7B", "size")[1].startswith("Qwen2-7B: Parameters")
