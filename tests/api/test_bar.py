"""The bar over many requests: shown to a person, or when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwenkit import LLM
from qwenkit.errors import UsageError
from tiny import write_tiny_checkpoint


def test_a_bar_counts_requests_and_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("TTY_INTERACTIVE", raising=False)
    sampling: dict[str, Any] = {"max_tokens": 3, "seed": 0}
    with LLM(write_tiny_checkpoint(tmp_path / "m")) as llm:
        llm.generate([[1, 2], [3]], sampling)  # nobody looks on
        llm.generate("a", sampling, progress=False)
        assert capsys.readouterr().err == ""
        llm.generate([[1, 2], [3], [4]], sampling, progress=True)
        shown = capsys.readouterr()
        assert "3/3" in shown.err
        assert "tokens/s" in shown.err
        assert shown.out == ""
        with pytest.raises(UsageError, match="progress"):
            llm.generate([[1]], sampling, progress="yes")  # type: ignore[call-overload]
