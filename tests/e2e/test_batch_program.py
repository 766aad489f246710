"""`qwenkit batch`: every request answered once, also when the program is killed on the way."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import HANG_S, PROGRAM
from qwenkit.api import AsyncLLM
from qwenkit.server.batch import run_batch
from qwenkit.server.batch_files import check_input, open_output
from qwenkit.server.settings import ServerSettings
from tiny import write_tiny_checkpoint

ANSWER_TOKENS = 100
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "tiny", config={"max_position_embeddings": 2048})


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def asked(custom_id: str, url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    full = {
        "messages": [{"role": "user", "content": custom_id}],
        "max_tokens": ANSWER_TOKENS,
        "seed": 1,
    }
    full |= {"ignore_eos": True}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body or full}


def answers(path: Path) -> dict[str, Any]:
    """The outcome of each request; none is there twice."""
    found: dict[str, Any] = {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        assert line["custom_id"] not in found
        assert line["id"].startswith("batch_req_")
        assert line["error"] is None
        response = line["response"]
        choices = response["body"].get("choices")
        found[line["custom_id"]] = response["status_code"], choices or response["body"]
    return found


def test_a_run_that_was_killed_goes_on(
    folder: Path, tmp_path: Path, environment: dict[str, str], run_program: Run
) -> None:
    requests = [asked(f"request {number}") for number in range(60)]
    source, output = write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    options = ("--model", str(folder), "--at-once", "4", "--threads", "1")
    command = [*PROGRAM, "batch", str(source), str(output), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    deadline_s = time.monotonic() + HANG_S
    while not output.exists() or output.read_bytes().count(b"\n") < 9:
        assert time.monotonic() < deadline_s
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    with output.open("ab") as file:  # as if it had been killed within a line
        file.write(b'{"id": "batch_req_torn", "custom_id": "request 59", "respon')
    left = 60 - output.read_bytes().count(b"\n")
    finished = run_program(*command[len(PROGRAM) :])
    assert finished.returncode == 0, finished.stderr
    assert f"{60 - left} of 60 requests are answered already" in finished.stderr
    found = answers(output)
    assert set(found) == {request["custom_id"] for request in requests}
    assert asyncio.run(in_one_go(folder, source, tmp_path / "whole.jsonl")) == 0
    assert answers(tmp_path / "whole.jsonl") == found
    again = run_program(*command[len(PROGRAM) :])
    assert again.returncode == 0
    assert "answers all 60 requests already" in again.stderr


async def in_one_go(folder: Path, source: Path, output: Path) -> int:
    async with AsyncLLM(folder, threads=1) as llm:
        file, done = open_output(output, check_input(source))
        with file:
            settings = ServerSettings(names=("tiny",), max_requests=1000)

            def advance(tokens: int) -> None:
                assert tokens == ANSWER_TOKENS

            return await run_batch(llm, settings, source, file, done, at_once=60, advance=advance)


def test_requests_of_every_kind_and_those_that_fail(
    folder: Path, tmp_path: Path, run_program: Run
) -> None:
    requests = [
        asked("chat"),
        asked("text", "/v1/completions", prompt="a", max_tokens=2),
        asked("vector", "/v1/embeddings", input="a"),
        asked("response", "/v1/responses", input="a", max_output_tokens=2),
        asked("named", "/v1/completions", model="mine", prompt="a"),
        asked("unnamed", "/v1/completions", model="other", prompt="a"),
        asked("wrong", "/v1/completions", prompt="a", temperatur=1),
        asked("streamed", "/v1/completions", prompt="a", stream=True),
        {"custom_id": "bodiless", "method": "POST", "url": "/v1/completions"},
    ]
    source, output = write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    model = ("--model", str(folder), "--served-model-name", "mine")
    done = run_program("batch", str(source), str(output), *model)
    assert done.returncode == 1
    assert "4 of them failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert {name: status for name, (status, _) in answers(output).items()} == {
        **dict.fromkeys(("chat", "text", "vector", "response", "named"), 200),
        **dict.fromkeys(("wrong", "streamed", "bodiless"), 400),
        "unnamed": 404,
    }


def test_files_that_are_none_are_refused_before_anything_is_loaded(
    tmp_path: Path, run_program: Run
) -> None:
    output = tmp_path / "out.jsonl"

    def refused(source: Path) -> str:
        done = run_program("batch", str(source), str(output), "--model", "no/model", "--offline")
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        return done.stderr

    assert "cannot be read" in refused(tmp_path / "missing.jsonl")
    assert "no requests" in refused(write(tmp_path / "empty.jsonl", []))
    twice = write(tmp_path / "twice.jsonl", [asked("a"), asked("b"), asked("a")])
    assert "line 3: the custom_id 'a' is there twice" in refused(twice)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"custom_id": "a"}\nnope\n[]\n', encoding="utf-8")
    assert "line 2: it is not JSON" in (said := refused(broken))
    assert "line 3: expected an object" in said
    source = write(tmp_path / "in.jsonl", [asked("a")])
    output.write_text("something else\n", encoding="utf-8")
    assert "no output of a batch" in refused(source)
    write(output, [{"custom_id": "b", "response": {}}])
    assert "answers other requests ('b')" in refused(source)
    assert output.read_text(encoding="utf-8").count("\n") == 1  # nothing was touched
