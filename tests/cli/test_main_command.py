"""The program around the commands: its list, its errors, its light start."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from qwenkit import __version__
from qwenkit.cli.main import COMMANDS, app, load_command
from qwenkit.errors import ModelNotFoundError, RequestError

runner = CliRunner()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """Makes the loading of a model fail with the exception put into this list."""
    errors: list[Exception] = []

    def load_model(name: str, given: Any) -> None:
        logging.getLogger("qwenkit.load").warning("a %s warning", "\x1b[2J")
        logging.getLogger("qwenkit.load").info("a detail")
        raise errors[0]

    monkeypatch.setattr("qwenkit.cli.loading.load_model", load_model)
    return errors


def ask(*args: str) -> Any:
    return runner.invoke(app, [*args, "chat", "--prompt", "q"])


def test_help_and_version_import_nothing_slow() -> None:
    program = (
        "import sys; from qwenkit.cli.main import app\n"
        "for args in (['--help'], ['--version'], ['chat', '--help'], ['generate', '--help']):\n"
        "    try: app(args, prog_name='qwenkit')\n"
        "    except SystemExit as end: assert end.code == 0, end.code\n"
        "slow = {'torch', 'numpy', 'rich', 'prompt_toolkit', 'huggingface_hub', 'tiktoken'}\n"
        "print(sorted(slow & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False
    )
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert f"qwenkit {__version__}" in done.stdout
    for name, summary in COMMANDS.items():
        assert name in done.stdout
        assert summary in done.stdout


@pytest.mark.parametrize("name", ["chat", "generate"])
def test_help_tells_defaults_and_examples(name: str) -> None:
    text = runner.invoke(app, [name, "--help"]).stdout
    assert "Examples:" in text
    assert f"qwenkit {name}" in text
    command = load_command(name)
    assert all(getattr(parameter, "help", None) for parameter in command.params)


def test_unknown_command_and_option_name_the_nearest() -> None:
    for args, nearest in ((["chta"], "'chat'"), (["--verson"], "--version")):
        result = runner.invoke(app, args)
        assert result.exit_code == 2
        assert nearest in result.stderr


def test_our_error_is_one_line(failing: list[Exception]) -> None:
    failing.append(ModelNotFoundError("no model\n  \x1b[31m'x'"))
    result = ask()
    assert result.exit_code == 1
    assert "Error: no model ␛[31m'x'\n" in result.stderr
    assert "Traceback" not in result.output


def test_usage_errors_exit_with_2(failing: list[Exception]) -> None:
    failing.append(RequestError("top_k", "must not be odd"))
    result = ask()
    assert result.exit_code == 2
    assert "Error: top_k: must not be odd\n" in result.stderr


def test_system_errors_are_one_line_too(failing: list[Exception]) -> None:
    failing.append(PermissionError(13, "Permission denied", "/model"))
    result = ask()
    assert result.exit_code == 1
    assert "Permission denied: '/model'" in result.stderr


def test_warnings_of_the_library_are_shown_and_harmless(failing: list[Exception]) -> None:
    failing.append(ModelNotFoundError("gone"))
    result = ask()
    assert "WARNING: a ␛[2J warning" in result.stderr
    assert "a detail" not in result.stderr
    assert "WARNING" not in result.stdout


def test_debug_shows_details_and_the_exception(failing: list[Exception]) -> None:
    failing.append(ModelNotFoundError("gone"))
    for result in (
        ask("--debug"),
        runner.invoke(app, ["chat", "--prompt", "q"], env={"QWENKIT_DEBUG": "1"}),
    ):
        assert isinstance(result.exception, ModelNotFoundError)
        assert "INFO: a detail" in result.stderr


def test_ctrl_c_while_loading_exits_as_shells_expect(failing: list[Exception]) -> None:
    failing.append(KeyboardInterrupt())  # type: ignore[arg-type]
    assert ask().exit_code == 130
