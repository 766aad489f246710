"""`qwenkit bench needle`: what it writes, goes on with and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qwenkit.cli.main import app
from tiny import write_tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"max_position_embeddings": 2048}
    return write_tiny_checkpoint(tmp_path_factory.mktemp("needle") / "tiny", config=config)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", "needle", *map(str, arguments)])


def test_the_needle_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = [folder, "--length", 400, "--depth", 50, "--compute", "reference", "--out", out]
    result = invoke(*given)
    assert result.exit_code == 0, result.output
    assert "| per-request | 400 |\n| --- | ---: |\n| 50 % | 0.00 |" in result.stdout
    assert {p.name for p in out.iterdir()} == {"needle.json", "needle.md", "needle.svg"}
    cell = json.loads((out / "needle.json").read_text())["cells"]["per-request"]["400"]["50"]
    assert cell["prompt_tokens"] == 400 - 32
    again = json.loads(invoke(*given, "--json").stdout)
    assert again["cells"]["per-request"]["400"]["50"] == cell


def test_another_haystack_of_the_same_name_is_refused(folder: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    given = [folder, "--length", 400, "--depth", 50, "--compute", "reference"]
    given += ["--haystack", book, "--out", tmp_path / "out"]
    book.write_text("The sea was calm. " * 40)
    assert invoke(*given).exit_code == 0
    book.write_text("The sea was rough. " * 40)
    result = invoke(*given)
    assert result.exit_code == 2
    assert "another haystack of the same name. Give another folder." in " ".join(
        result.stderr.split()
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--language", "fr"], "language: got 'fr'"),
        (["--needles", "9"], "needles: got 9; allowed: 1 to 8"),
        (["--needle", "x"], "--needle takes an --answer each, and one --question"),
        (["--needle", "x", "--answer", "{code}", "--question", "y"], "--answer has {code}, but"),
        (["--question", "x"], "--needle takes an --answer each, and one --question"),
        (["--haystack", "/dev/null"], "--haystack: '/dev/null' has no text"),
        (["--length", "100"], "question and needles alone are"),
        (["--length", "20000"], "length: got 20000; tiny allows 1 to 8192"),
    ],
)
def test_what_cannot_be_hunted_is_refused(folder: Path, given: list[str], message: str) -> None:
    result = invoke(folder, "--compute", "reference", *given)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
