"""`qwenkit chat` as a command, and its terminal loop with a scripted reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qwenkit.cli import console
from qwenkit.cli.chat_input import history_file
from qwenkit.cli.chat_session import ChatSession
from qwenkit.cli.chat_terminal import converse, welcome
from qwenkit.cli.main import app
from qwenkit.types.messages import Message
from qwenkit.types.sampling import SamplingParams

runner = CliRunner()


def run(*args: str, stdin: str | bytes | None = None) -> Any:
    return runner.invoke(app, ["chat", *args], input=stdin)


class ScriptedReader:
    """Gives the lines one by one; an exception instead of a line is raised. Ends with Ctrl-D."""

    def __init__(self, *lines: str | BaseException) -> None:
        self._lines = iter(lines)

    def read(self) -> str:
        line = next(self._lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line


def test_one_question_puts_only_the_reply_on_standard_output(loaded: Any, model: Any) -> None:
    result = run("--prompt", "What?")
    assert (result.exit_code, result.stdout) == (0, "Hello.\n")
    assert "3 tokens" in result.stderr
    assert loaded[0]["name"] == "default"
    assert model.sent == [(Message("user", "What?"),)]
    assert model.used[0] == SamplingParams(temperature=0.2, seed=1234, max_tokens=2048)


def test_piped_text_is_answered_once(loaded: Any, model: Any) -> None:
    result = run(stdin="第一行\nsecond line\n")
    assert (result.exit_code, result.stdout) == (0, "Hello.\n")
    assert model.sent == [(Message("user", "第一行\nsecond line"),)]


def test_options_of_the_original_demo_and_ours(loaded: Any, model: Any, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Be brief.", encoding="utf-8")
    flags = "-c some/model -s 7 --cpu-only --top-p 0.5 --top-k 3 --min-p 0.1 --max-tokens 5"
    more = "--repetition-penalty 1.1 --stop A --stop B --threads 2 --dtype float32 --context 512"
    last = f"--compute reference --offline --greedy --system-file {tmp_path / 'system.txt'}"
    rest = ("--pin-threads", "--rope", "as-config", "--prompt", "q")
    rest += ("--speculation", "prompt-lookup")
    kinds = ("--weights", "int4", "--group-size", "64", "--head-weights", "bf16")
    result = run(*kinds, *f"{flags} {more} {last}".split(), *rest)
    assert result.exit_code == 0, result.stderr
    assert loaded == [
        {
            "name": "some/model",
            "dtype": "float32",
            "weights": "int4",
            "group_size": 64,
            "head_weights": "bf16",
            "compute": "reference",
            "device": "cpu",
            "device_map": None,
            "threads": 2,
            "pin_threads": True,
            "kv_dtype": "auto",
            "context": 512,
            "rope": "as-config",
            "adapter": None,
            "speculation": "prompt-lookup",
            "draft": None,
            "revision": None,
            "offline": True,
        }
    ]
    assert model.used[0] == SamplingParams(
        temperature=0.0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        max_tokens=5,
        repetition_penalty=1.1,
        stop=("A", "B"),
        seed=7,
    )
    assert model.sent[0] == (Message("system", "Be brief."), Message("user", "q"))


def test_positional_model_and_prompt_with_an_empty_system(loaded: Any, model: Any) -> None:
    assert run("a/b", "q", "--system", "").exit_code == 0
    assert loaded[0]["name"] == "a/b"
    assert model.sent[0] == (Message("system", ""), Message("user", "q"))


@pytest.mark.parametrize(
    ("args", "stdin", "said"),
    [
        ((), "", "empty"),
        (("--prompt", " "), None, "empty"),
        ((), b"\xff\xfe", "UTF-8"),
        (("--prompt", "q", "--greedy", "--temperature", "1"), None, "--greedy"),
        (("--prompt", "q", "--temperature", "1000"), None, "temperature"),
        (("--prompt", "q", "--seed", "-1"), None, "seed"),
        (("a", "-c", "b", "--prompt", "q"), None, "give one"),
        (("a", "q", "--cpu-only", "--device", "auto"), None, "--cpu-only and another device"),
        (("a", "q", "--cpu-only", "--device-map", "auto"), None, "--cpu-only and another device"),
        (("a", "p", "--prompt", "q"), None, "give one"),
        (("--system", "a", "--system-file", "b", "--prompt", "q"), None, "give one"),
        (("--system-file", "/nowhere/at/all", "--prompt", "q"), None, "cannot be read"),
        (("What is the capital of France?",), None, "no model name"),
        (("--promt", "q"), None, "--prompt"),
    ],
)
def test_misuse_is_one_clear_line_and_exit_code_2(
    loaded: Any, args: tuple[str, ...], stdin: Any, said: str
) -> None:
    result = run(*args, stdin=stdin)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert not loaded, "nothing is loaded before the options are checked"


def test_failed_reply_exits_with_1(loaded: Any, model: Any) -> None:
    model.reason, model.error = "error", "logits are not finite"
    result = run("--prompt", "q")
    assert result.exit_code == 1
    assert "logits are not finite" in result.stderr


def test_control_characters_never_reach_the_terminal(loaded: Any, model: Any) -> None:
    model.script = ("\x1b", "]0;title\x07", "\r\n\tgood\x7f", "\x9b2J")
    assert run("--prompt", "q").stdout == "␛]0;title␇\n\tgood␡\\x9b2J\n"


def test_visible_maps_every_control_character_and_nothing_else() -> None:
    for code in [*range(0x20), *range(0x7F, 0xA0)]:
        shown = console.visible(chr(code))
        assert shown == chr(code) if code in (9, 10) else all(c.isprintable() for c in shown)
    assert console.visible("Qwen 通义 🙂 é") == "Qwen 通义 🙂 é"


def test_conversation_shows_replies_commands_and_errors(
    model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    session = ChatSession(model, sampling=SamplingParams())
    reader = ScriptedReader(
        "hi", KeyboardInterrupt(), "  ", ":conf top_k=5", ":conf topk=1", ":wrong", "x" * 2000, "yo"
    )
    converse(session, reader)
    out, err = capsys.readouterr()
    assert out == "Scripted-Chat> Hello.\ntop_k = 5\nScripted-Chat> Hello.\n"
    assert "Ctrl-D" in err
    assert "'top_k'" in err
    assert "No command :wrong" in err
    assert "the context only 1000" in err
    assert [turn.question for turn in session.turns] == ["hi", "yo"]
    assert model.used[-1].top_k == 5


def test_exit_ends_the_conversation(model: Any) -> None:
    session = ChatSession(model, sampling=SamplingParams())
    converse(session, ScriptedReader(":q", AssertionError("read after the end")))


def test_ctrl_c_stops_the_reply_and_not_the_conversation(
    model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    session = ChatSession(model, sampling=SamplingParams())
    model.script = ("one ", "^C", "two ")
    converse(session, ScriptedReader("count", ":history"))
    out, err = capsys.readouterr()
    assert [(t.answer, t.ended) for t in session.turns] == [("one ", "abort")]
    assert "one  [stopped" in out
    assert "two" not in out
    assert ":continue" in err
    assert model.open_streams == 0


def test_ctrl_c_while_a_piece_is_written(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(text: str, *, end: str = "\n") -> None:
        if text == "lo":
            raise KeyboardInterrupt

    monkeypatch.setattr(console, "say", say)
    session = ChatSession(model, sampling=SamplingParams())
    converse(session, ScriptedReader("q"))
    assert [(t.answer, t.ended) for t in session.turns] == [("Hello", "abort")]
    assert model.open_streams == 0


def test_ctrl_c_in_a_one_shot_exits_as_shells_expect(loaded: Any, model: Any) -> None:
    model.script = ("one ", "^C", "two ")
    result = run("--prompt", "q")
    assert (result.exit_code, result.stdout) == (130, "one \n")


def test_continue_extends_the_last_reply(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model.reason = "length"
    session = ChatSession(model, sampling=SamplingParams())
    converse(session, ScriptedReader("q", ":continue"))
    assert session.turns[0].answer == "Hello.Hello."
    assert ":conf max_tokens=N" in capsys.readouterr().err


def test_welcome_says_who_speaks_in_two_languages(model: Any) -> None:
    default = welcome(model.record, "default", 160)
    assert "SmolLM2-135M-Instruct" in default
    assert "160 tokens" in default
    assert "not a Qwen" in default
    assert "不是通义千问" in default
    other = welcome(model.record, "some/llama", 160)
    assert "Scripted-Chat, which is not a Qwen" in other
    assert ":help" in other


def test_history_file_follows_the_xdg_state_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "qwenkit" / "chat_history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_file() == tmp_path / ".local" / "state" / "qwenkit" / "chat_history"
