"""Opening a model: what is refused is named as on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwenkit.cli import loading
from qwenkit.cli.main import app
from qwenkit.errors import UsageError


def test_names_of_settings_are_checked_before_any_download() -> None:
    with pytest.raises(UsageError, match=r"^--dtype: got 'float16'\. .*'bfloat16'"):
        loading.load_model("no/model", dtype="float16", offline=True)
    with pytest.raises(UsageError, match=r"^--compute: got 'fast'.*reference"):
        loading.load_model("no/model", compute="fast", offline=True)


def test_a_context_that_the_model_lacks(default_model_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--context: got 99999999; .* allows 1 to 32768"):
        loading.load_model(str(default_model_path), context=99_999_999)


def test_a_tiny_context_and_a_longer_prompt(default_model_path: Path) -> None:
    args = ["generate", str(default_model_path), "--context", "4", "--prompt"]
    result = CliRunner().invoke(app, [*args, "one two three four five six"])
    assert result.exit_code == 2
    assert "Error: the prompt has 6 tokens, the context 4" in result.stderr
    assert CliRunner().invoke(app, [*args, "Once"]).exit_code == 0
