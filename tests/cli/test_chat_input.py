"""The line editor, fed with the bytes that a terminal would send."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from qwenkit.cli.chat_input import PromptReader, history_file

Typist = Callable[[str], PromptReader]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Typist]:
    """A reader of what is typed; its history lies in `tmp_path`."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):

        def type_text(text: str) -> PromptReader:
            keys.send_text(text)
            return PromptReader()

        yield type_text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hello\r", "hello"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("\x1b[200~def f():\n\n  pass\x1b[201~\r", "def f():\n\n  pass"),
        ("你号\x7f好\r", "你好"),
        ("a\\b\r", "a\\b"),
    ],
)
def test_messages_of_one_and_several_lines(typed: Typist, keys: str, message: str) -> None:
    assert typed(keys).read() == message


def test_ctrl_c_and_ctrl_d(typed: Typist) -> None:
    reader = typed("half\x03\x04")
    with pytest.raises(KeyboardInterrupt):
        reader.read()
    with pytest.raises(EOFError):
        reader.read()


def test_history_outlives_the_program_and_is_private(typed: Typist) -> None:
    assert typed("first\r").read() == "first"
    assert typed("\x1b[A\r").read() == "first", "arrow up"
    assert stat.S_IMODE(history_file().stat().st_mode) == 0o600


def test_history_that_cannot_be_kept_is_said_and_harmless(
    typed: Typist,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert typed("hello\r").read() == "hello"
    assert "not remembered" in capsys.readouterr().err
