"""`qwenkit generate`: where the prompt comes from, and what is written as text and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from qwenkit.cli.main import app
from qwenkit.types.events import Usage
from qwenkit.types.sampling import LoopDetection, SamplingParams

runner = CliRunner()


def run(*args: str, stdin: str | bytes | None = None) -> Any:
    return runner.invoke(app, ["generate", *args], input=stdin)


@dataclass
class Done:
    """A completion as the api gives it, with the numbers that JSON cannot hold."""

    text: str
    finish_reason: str = "length"
    error: str | None = None
    matched_stop: str | None = None
    prompt_token_ids: tuple[int, ...] = (7, 8)
    token_ids: tuple[int, ...] = (1,)
    usage: Usage = Usage(2, 1)  # noqa: RUF009
    seed: int = 99

    @property
    def logprobs(self) -> tuple[Any, ...]:
        return (SimpleNamespace(token_id=1, logprob=-0.5, top=((1, -0.5), (2, -math.inf))),)

    @property
    def prompt_logprobs(self) -> tuple[Any, ...]:
        return (None, SimpleNamespace(token_id=1, logprob=-2.0, top=()))

    @property
    def timing(self) -> Any:
        return SimpleNamespace(
            first_token_s=0.1,
            total_s=0.2,
            prefill_tokens_per_second=20.0,
            decode_tokens_per_second=math.nan,
        )


def strict_json(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_text_goes_to_standard_output_and_the_closing_line_elsewhere(
    loaded: Any, model: Any
) -> None:
    result = run("--prompt", "Once\n")
    assert (result.exit_code, result.stdout) == (0, "Hello.\n")
    assert "3 tokens" in result.stderr
    assert model.prompts == ["Once\n"]
    assert model.used == [SamplingParams(temperature=0.2, max_tokens=128)]
    assert loaded[0]["name"] == "default"


def test_penalties_and_bounds_of_the_length_reach_the_model(loaded: Any, model: Any) -> None:
    given = ["--presence-penalty", "0.5", "--frequency-penalty", "-0.25", "--min-tokens", "3"]
    assert run("--prompt", "Once", *given, "--ignore-eos").exit_code == 0
    assert model.used == [
        SamplingParams(
            temperature=0.2,
            max_tokens=128,
            presence_penalty=0.5,
            frequency_penalty=-0.25,
            min_tokens=3,
            ignore_eos=True,
        )
    ]


def test_echo_puts_the_prompt_first(loaded: Any) -> None:
    assert run("--prompt", "Say: ", "--echo").stdout == "Say: Hello.\n"


def test_prompt_from_a_file_or_a_pipe_loses_one_newline(
    loaded: Any, model: Any, tmp_path: Path
) -> None:
    (tmp_path / "p").write_text("埃塞俄比亚的首都是\n\n", encoding="utf-8")
    assert run("--prompt-file", str(tmp_path / "p")).exit_code == 0
    assert run(stdin="Q?\r\nA:\n").exit_code == 0
    assert model.prompts == ["埃塞俄比亚的首都是\n", "Q?\r\nA:"]


def test_flags_of_the_published_quick_start(loaded: Any, model: Any) -> None:
    prompt = "Q: What is the biggest animal?\nA:"
    result = run("--model_name_or_path", "x/y", "--prompt", prompt, "--max_new_tokens", "32")
    assert result.exit_code == 0, result.stderr
    assert loaded[0]["name"] == "x/y"
    assert model.used[0].max_tokens == 32


def test_json_holds_everything_and_no_nan(
    loaded: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = Done("a\x1b\x9b文")
    monkeypatch.setattr(type(model), "generate", lambda *a: done, raising=False)
    result = run("--prompt", "p\x7f", "--json", "--logprobs", "2", "--echo")
    assert result.exit_code == 0, result.stderr
    assert all(c.isprintable() or c == "\n" for c in result.stdout)
    assert strict_json(result.stdout) == {
        "model": "Scripted-Chat",
        "prompt": "p\x7f",
        "prompt_token_ids": [7, 8],
        "token_ids": [1],
        "text": "p\x7fa\x1b\x9b文",
        "finish_reason": "length",
        "matched_stop": None,
        "error": None,
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 1,
            "cached_tokens": 0,
            "extension": {"method": "none", "factor": 1.0, "trained_tokens": None},
        },
        "logprobs": [
            {
                "token_id": 1,
                "text": "one",
                "logprob": -0.5,
                "top": [
                    {"token_id": 1, "text": "one", "logprob": -0.5},
                    {"token_id": 2, "text": "\ufffd", "logprob": None, "bytes": [0xE6, 0x96]},
                ],
            }
        ],
        "prompt_logprobs": [None, {"token_id": 1, "text": "one", "logprob": -2.0, "top": []}],
        "seed": 99,
        "timing": {
            "first_token_s": 0.1,
            "total_s": 0.2,
            "prefill_tokens_per_second": 20.0,
            "decode_tokens_per_second": None,
        },
    }


def test_biases_scripts_and_the_loop_detection_reach_the_sampling(loaded: Any, model: Any) -> None:
    biases = ("--logit-bias", "7=-100", "--logit-bias", "3 = 2.5")
    guards = ("--allowed-scripts", "latin, Han", "--loop-detection")
    assert run("--prompt", "p", *biases, *guards).exit_code == 0
    assert model.used == [
        SamplingParams(
            temperature=0.2,
            max_tokens=128,
            logit_bias=((3, 2.5), (7, -100.0)),
            allowed_scripts=("Latin", "Han"),
            loop_detection=LoopDetection(),
        )
    ]


@pytest.mark.parametrize(("reason", "said"), [("language", "script"), ("loop", "ended in a loop")])
def test_what_a_guard_ended_is_no_failure_and_is_said(
    loaded: Any, model: Any, reason: Any, said: str
) -> None:
    model.reason = reason
    result = run("--prompt", "p")
    assert result.exit_code == 0
    assert said in result.stderr


@pytest.mark.parametrize("as_json", [True, False])
def test_failed_completion_exits_with_1(
    loaded: Any, model: Any, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    model.reason = "error"
    model.error = "logits are not finite"
    done = Done("", "error", model.error)
    monkeypatch.setattr(type(model), "generate", lambda *a: done, raising=False)
    result = run("--prompt", "p", *(["--json"] if as_json else []))
    assert result.exit_code == 1
    assert "logits are not finite" in result.stderr
    if as_json:
        assert strict_json(result.stdout)["error"] == "logits are not finite"


@pytest.mark.parametrize(
    ("args", "stdin", "said"),
    [
        (("--prompt", ""), None, "empty"),
        ((), "", "empty"),
        (("--prompt", "p", "--prompt-file", "f"), None, "give one"),
        (
            ("--prompt-file", "/nowhere/at/all"),
            None,
            "at/all' cannot be read: No such file or dir",
        ),
        (("--prompt", "p", "--logprobs", "3"), None, "--json"),
        (("--prompt", "p", "--json", "--logprobs", "-1"), None, "logprobs"),
        (("--prompt", "p", "--prompt-logprobs", "3"), None, "--json"),
        (("--prompt", "p", "--json", "--prompt-logprobs", "200"), None, "prompt_logprobs"),
        (("--prompt", "p", "--top-p", "2"), None, "top_p"),
        (("--prompt", "p", "--logit-bias", "13"), None, "write ID=X"),
        (("--prompt", "p", "--logit-bias", "13=1e308"), None, "-100.0 to 100.0"),
        (("--prompt", "p", "--logit-bias", "x=1"), None, "logit_bias"),
        (("--prompt", "p", "--allowed-scripts", "Latn"), None, "'Latin'"),
        (("--prompt", "\udcff"), None, "UTF-8"),
        (("--prompt", "p" * 1000), None, "too long"),
        (("m", "--model_name_or_path", "n", "--prompt", "p"), None, "give one"),
        (("--temprature", "1"), None, "--temperature"),
    ],
)
def test_misuse_is_one_clear_line_and_exit_code_2(
    loaded: Any, args: tuple[str, ...], stdin: Any, said: str
) -> None:
    result = run(*args, stdin=stdin)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_a_file_that_is_no_text(loaded: Any, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"ab\xff")
    result = run("--prompt-file", str(tmp_path / "p"))
    assert result.exit_code == 2
    assert result.stderr.endswith("is not UTF-8 text (byte 3).\n")
