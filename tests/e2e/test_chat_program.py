"""`qwenkit chat` and `qwenkit generate` as a person or a script meets them, with the real model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
QUESTION = "What is the capital of France?"


@pytest.mark.usefixtures("default_model_path")
def test_a_conversation_in_a_terminal(open_terminal: Any) -> None:
    terminal = open_terminal("chat", "--threads", "2")
    terminal.expect("SmolLM2-135M-Instruct.*not a Qwen.*不是通义千问.*:help.*User>")
    terminal.send(":conf temperature=0\r")
    terminal.expect("temperature = 0.0")
    terminal.send(f"{QUESTION}\r")
    terminal.expect(r"> .*Paris.*\d tokens/s · first token after")
    terminal.send(":seed 7\r")
    terminal.expect("seed = 7")
    terminal.send(":history\r")
    terminal.expect(r"\[1\] User: What is.*\[1\] .*Paris")

    terminal.send(":conf ignore_eos=true\r")
    terminal.expect("ignore_eos = true.*User>")
    terminal.send("Tell me a story.\r")  # it does not end by itself now
    terminal.expect(r"story\..*Q4_1> (\S+\s+){3}")  # not the line as it was typed
    terminal.send("\x03")
    terminal.expect("· stopped.*stays in the history.*:continue.*User>")
    terminal.send(":conf ignore_eos=false\r")
    terminal.expect("ignore_eos = false.*User>")
    terminal.send(":clear-his\r")
    terminal.expect(r"History cleared \(2 turns\)")
    terminal.send(f"{QUESTION}\r")
    terminal.expect("> .*Paris.*tokens/s")
    terminal.send(":exit\r")
    assert terminal.wait() == 0
    assert "Traceback" not in terminal.text


@pytest.mark.usefixtures("default_model_path")
def test_one_question_by_option_and_by_pipe(run_program: Run) -> None:
    piped = run_program("chat", "--greedy", "--threads", "2", stdin=f"{QUESTION}\n")
    asked = run_program("chat", "default", QUESTION, "--greedy", "--threads", "2")
    assert (piped.returncode, asked.returncode) == (0, 0), piped.stderr + asked.stderr
    assert "Paris" in asked.stdout
    assert piped.stdout == asked.stdout
    assert "tokens/s" in asked.stderr


@pytest.mark.usefixtures("default_model_path")
def test_raw_completion_as_json(run_program: Run) -> None:
    flags = ["--json", "--logprobs", "2", "--greedy", "--max-tokens", "4", "--threads", "2"]
    done = run_program("generate", *flags, stdin="The capital of France is")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert "Paris" in result["text"]
    assert len(result["token_ids"]) == len(result["logprobs"]) == 4
    assert result["usage"]["prompt_tokens"] == len(result["prompt_token_ids"]) == 5
    for token_id, logprob in zip(result["token_ids"], result["logprobs"], strict=True):
        assert logprob["token_id"] == token_id == logprob["top"][0]["token_id"]
        assert logprob["logprob"] <= 0
    assert result["finish_reason"] == "length"


def test_unknown_model_offline_names_the_embedded_one(run_program: Run) -> None:
    done = run_program("chat", "nobody/nothing-at-all", "--offline", "--prompt", "hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert "nobody/nothing-at-all" in done.stderr
    assert "default" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_closed_pipe_is_no_drama(environment: dict[str, str], default_model_path: Path) -> None:
    command = 'python="$1"; shift; "$python" -m qwenkit "$@" | head -c 1'
    arguments = ["generate", str(default_model_path), "--prompt", "Once upon a time", "--greedy"]
    done = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, *arguments],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=120,
        check=False,
    )
    assert len(done.stdout) == 1
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
