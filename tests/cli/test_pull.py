"""`qwenkit pull`: the path on standard output, everything else on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fake_hub import COMMIT, FakeHub, serving
from qwenkit.cli.main import app

FILES = {"config.json": b"{}", "model.safetensors": bytes(5000)}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving(FakeHub("Qwen/Tiny", dict(FILES))) as served:
        yield served


def pull(hub: FakeHub, cache: Path, name: str = "Qwen/Tiny") -> list[str]:
    return ["pull", name, "--endpoint", hub.endpoint, "--cache-dir", str(cache)]


def test_it_prints_where_the_model_is(hub: FakeHub, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, pull(hub, tmp_path))
    assert done.exit_code == 0
    path = Path(done.stdout.removesuffix("\n"))
    assert path == tmp_path / "models--Qwen--Tiny" / "snapshots" / COMMIT
    assert (path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert "checksums verified" in done.stderr


def test_a_refusal_is_one_line(hub: FakeHub, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, pull(hub, tmp_path, "Qwen/Qwen2-0.5b-Instuct"))
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Did you mean 'Qwen/Qwen2-0.5B-Instruct'" in done.stderr


def test_a_wrong_checksum_fails(hub: FakeHub, tmp_path: Path) -> None:
    hub.served["model.safetensors"] = b"\1" * 5000
    done = CliRunner().invoke(app, pull(hub, tmp_path))
    assert done.exit_code == 1
    assert "model.safetensors" in done.stderr
    assert "checksum" in done.stderr


def test_a_path_needs_no_download_and_no_claim(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["pull", str(tmp_path)])
    assert done.exit_code == 0
    assert done.stdout == f"{tmp_path}\n"
    assert "verified" not in done.stderr


def test_a_relative_path_is_no_download_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    done = CliRunner().invoke(app, ["pull", "./model"])
    assert done.exit_code == 0
    assert "nothing to download" in done.stderr


@pytest.mark.parametrize("name", ["default", "/"])
def test_options_of_a_hub_are_refused_where_none_is_asked(name: str) -> None:
    done = CliRunner().invoke(app, ["pull", name, "--revision", "x", "--endpoint", "https://y"])
    assert done.exit_code == 2
    assert "--revision and --endpoint" in done.stderr


@pytest.mark.parametrize("name", ["", "foo bar"])
def test_what_is_no_name_is_told_without_an_option_that_is_not_there(name: str) -> None:
    done = CliRunner().invoke(app, ["pull", name])
    assert done.exit_code == 2
    assert "hub name" in done.stderr
    assert "--prompt" not in done.stderr
