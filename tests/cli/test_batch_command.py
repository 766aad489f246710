"""`qwenkit batch`: what a further run over the same files asks, says, keeps and gives back."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from typer.testing import CliRunner

from qwenkit.cli.main import app
from qwenkit.server.batch_files import requests_of


class Engine:
    """Answers every request that is not in `fails`, and ends at the first in `kills`."""

    def __init__(self, folder: Path) -> None:
        self.source, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.fails: set[str] = set()
        self.kills: set[str] = set()
        self.asked: list[str] = []
        self.loads = 0

    def load(self, *_: Any) -> Any:
        self.loads += 1
        return SimpleNamespace(record=SimpleNamespace(name="tiny"), close_now=lambda: None)

    async def answer(
        self,
        _llm: Any,
        _settings: Any,
        source: Path,
        output: IO[bytes],
        done: Container[str],
        **_: Any,
    ) -> int:
        failed = 0
        for asked in requests_of(source):
            if asked.custom_id in done:
                continue
            if asked.custom_id in self.kills:
                raise KeyboardInterrupt
            self.asked.append(asked.custom_id)
            status = 500 if asked.custom_id in self.fails else 200
            failed += status != 200
            response = {"status_code": status, "body": {}}
            line = {"id": "batch_req_1", "custom_id": asked.custom_id, "response": response}
            output.write(json.dumps(line | {"error": None}).encode() + b"\n")
            output.flush()
        return failed

    def write(self, ids: Iterable[Any], **changed: Any) -> None:
        lines = [{"custom_id": one, "url": "/v1/completions", "body": {}} | changed for one in ids]
        self.source.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(self, *options: str) -> tuple[int, str]:
        """The exit code, and what was said."""
        self.asked = []
        done = CliRunner().invoke(app, ["batch", str(self.source), str(self.output), *options])
        return done.exit_code, done.output

    @property
    def held(self) -> list[tuple[str, int]]:
        """The ids in the output, and how they went, line by line."""
        lines = map(json.loads, self.output.read_text().splitlines())
        return [(line["custom_id"], line["response"]["status_code"]) for line in lines]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine(tmp_path)
    monkeypatch.setattr("qwenkit.cli.loading.load_served_model", made.load)
    monkeypatch.setattr("qwenkit.server.batch.run_batch", made.answer)
    made.write("abcd")
    return made


def test_failures_are_said_as_long_as_they_are_there(engine: Engine) -> None:
    engine.fails = {"b", "d"}
    code, said = engine.run()
    assert (code, engine.asked) == (1, ["a", "b", "c", "d"])
    assert "2 of them failed; their lines say why. --retry-failed asks them again." in said
    code, said = engine.run()
    assert (code, engine.asked, engine.loads) == (1, [], 1)
    assert "answers all 4 requests already" in said
    assert "2 of them failed" in said
    engine.write("abcde")
    code, said = engine.run()
    assert (code, engine.asked) == (1, ["e"])
    assert "2 of them failed" in said


def test_those_that_failed_are_asked_again(engine: Engine) -> None:
    engine.fails = {"b", "d"}
    engine.run()
    engine.fails = {"d"}
    code, said = engine.run("--retry-failed")
    assert (code, engine.asked) == (1, ["b", "d"])
    assert "2 of 4 requests are answered already" in said
    assert "1 of them failed" in said
    assert engine.held == [("a", 200), ("c", 200), ("b", 200), ("d", 500)]
    engine.fails = set()
    code, said = engine.run("--retry-failed")
    assert (code, engine.asked) == (0, ["d"])
    assert "of them failed" not in said
    assert engine.held == [("a", 200), ("c", 200), ("b", 200), ("d", 200)]
    code, said = engine.run("--retry-failed")
    assert (code, engine.asked, engine.loads) == (0, [], 3)


def test_a_second_try_that_is_ended_loses_nothing(engine: Engine) -> None:
    engine.fails = {"b", "d"}
    engine.run()
    engine.fails, engine.kills = set(), {"d"}
    code, _ = engine.run("--retry-failed")
    assert code != 0
    assert engine.held == [("a", 200), ("c", 200), ("d", 500), ("b", 200)]
    engine.kills = set()
    assert engine.run("--retry-failed")[0] == 0
    assert engine.asked == ["d"]


def test_a_second_try_that_is_killed_loses_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.fails = {"b", "d"}
    engine.run()
    engine.fails, engine.kills = set(), {"d"}
    with monkeypatch.context() as patched:  # kill -9: nothing comes after the last answer
        patched.setattr("qwenkit.server.batch_files.drop_replaced", lambda *_: None)
        engine.run("--retry-failed")
    assert engine.held == [("a", 200), ("b", 500), ("c", 200), ("d", 500), ("b", 200)]
    code, said = engine.run()
    assert (code, engine.asked) == (1, [])
    assert "1 of them failed" in said
    assert engine.held == [("a", 200), ("c", 200), ("d", 500), ("b", 200)]


def test_what_is_no_batch_is_refused_before_anything_is_loaded(engine: Engine) -> None:
    before = engine.source.read_bytes()
    engine.output = engine.source
    code, said = engine.run()
    assert (code, engine.source.read_bytes()) == (2, before)
    assert "are one file" in said
    engine.output = engine.source.with_name("copy.jsonl")
    engine.output.write_bytes(before)
    code, said = engine.run()
    assert (code, engine.output.read_bytes()) == (2, before)
    assert "copy.jsonl, line 1: " in said
    engine.write("ab", url="/v1/models")
    assert (engine.run()[0], "line 2: url: got '/v1/models'" in engine.run()[1]) == (2, True)
    engine.write([1])
    assert (engine.run()[0], "custom_id must be a string" in engine.run()[1]) == (2, True)
    assert engine.loads == 0
