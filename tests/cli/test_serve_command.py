"""What the options of `qwenkit serve` make the server allow."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from qwenkit.cli import beside
from qwenkit.cli.main import app
from qwenkit.server.settings import MIB, ServerSettings

runner = CliRunner()


class Started:
    """What the command asked to load and to serve; nothing is."""

    def __init__(self) -> None:
        self.loaded: tuple[Any, ...] = ()
        self.settings = ServerSettings()
        self.address: tuple[str, int] = ("", 0)
        self.pages: list[tuple[str, str | None]] = []
        self.closed = False

    def load(self, *given: Any) -> Any:
        self.loaded = given
        record = SimpleNamespace(name="files-name", model_type=self.model_type)
        return SimpleNamespace(record=record, close_now=self.close)

    model_type = "qwen2"

    def close(self) -> None:
        self.closed = True

    def serve(
        self,
        llm: Any,
        settings: ServerSettings,
        listening: socket.socket,
        *,
        ready: Callable[[], None],
    ) -> None:
        self.settings, self.address = settings, listening.getsockname()[:2]
        listening.close()
        ready()

    def start_page(self, url: str, *, api_key: str | None = None) -> None:
        self.pages.append((url, api_key))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    made = Started()
    monkeypatch.setattr("qwenkit.cli.loading.load_served_model", made.load)
    monkeypatch.setattr("qwenkit.server.run.serve", made.serve)
    monkeypatch.setattr("qwenkit.cli.serve._log_lines", lambda: None)
    monkeypatch.setattr(beside, "check_page", lambda: None)
    monkeypatch.setattr(beside, "start_page", made.start_page)
    monkeypatch.setattr(beside, "ending", nullcontext)
    monkeypatch.delenv(beside.KEY_VARIABLE, raising=False)
    return made


def serve(*args: str) -> str:
    done = runner.invoke(app, ["serve", "--port", "0", *args])
    assert done.exit_code == 0, done.output
    return done.output


def test_alone_it_listens_on_this_machine_without_a_key(started: Started) -> None:
    said = serve("Qwen/Qwen2-0.5B-Instruct")
    assert started.address[0] == "127.0.0.1"
    assert f"http://127.0.0.1:{started.address[1]}/v1" in said
    settings = started.settings
    assert settings == ServerSettings(names=("Qwen/Qwen2-0.5B-Instruct",), aliases=("Qwen",))
    assert started.closed


def test_names(started: Started, tmp_path: Path) -> None:
    serve()
    assert started.settings.names == ("files-name",)
    serve(str(tmp_path))  # a path of this machine is nobody's business
    assert started.settings.names == ("files-name",)
    serve("--served-model-name", "a", "--served-model-name", "b")
    assert started.settings.names == ("a", "b")
    started.model_type = "llama"
    serve()
    assert started.settings.aliases == ()  # no Qwen


def test_the_flags_of_the_first_generation(started: Started) -> None:
    done = runner.invoke(
        app,
        [
            *("serve", "-c", "some/model", "--cpu-only", "--server-port", "0", "--disable-gc"),
            *("--server-name", "127.0.0.1", "--api-auth", "me:pass:word"),
        ],
    )
    assert done.exit_code == 0, done.output
    assert started.loaded[0] == "some/model"
    assert started.settings.access.users == (("me", "pass:word"),)


def test_keys_from_everywhere(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("# a comment\nfrom-file\n\nalso\n", encoding="utf-8")
    monkeypatch.setenv(beside.KEY_VARIABLE, "from-environment")
    said = serve("--host", "0.0.0.0", "--api-key", "k", "--api-key-file", str(file))
    assert started.settings.access.api_keys == ("k", "from-environment", "from-file", "also")
    assert not started.settings.allow_priority  # several parties
    assert "from-" not in said
    serve("--api-key", "k", "--allow-priority")
    assert started.settings.allow_priority
    file.write_text("# nothing\n", encoding="utf-8")
    assert runner.invoke(app, ["serve", "--api-key-file", str(file)]).exit_code == 2


def test_limits_hosts_origins_and_what_is_loaded(started: Started) -> None:
    serve(
        *("--max-requests", "7", "--max-choices", "3", "--max-prompts", "4"),
        *("--max-body-mib", "2", "--drain-seconds", "9", "--log-prompts"),
        *("--step-seconds", "50"),
        *("--allowed-host", "a.example", "--allow-origin", "https://b.example"),
        *("--kv-cache-tokens", "99", "--adapter", "law=folder", "--adapter", "tales=other"),
        *("--weights", "int4", "--context", "512"),
    )
    settings = started.settings
    assert (settings.max_requests, settings.max_choices, settings.max_prompts) == (7, 3, 4)
    assert (settings.max_body_bytes, settings.drain_s, settings.log_prompts) == (2 * MIB, 9, True)
    assert settings.step_s == 50
    assert settings.access.hosts == ("a.example",)
    assert settings.access.origins == ("https://b.example",)
    _, given, adapters, kv_cache_tokens = started.loaded
    assert (adapters, kv_cache_tokens) == ({"law": "folder", "tales": "other"}, 99)
    assert (given.weights, given.context) == ("int4", 512)


@pytest.mark.parametrize("name", ["default", "a", "b"])
def test_an_adapter_is_not_called_as_the_model_is(started: Started, name: str) -> None:
    given = ["serve", "--served-model-name", "a", "--served-model-name", "b"]
    result = runner.invoke(app, [*given, "--adapter", f"{name}=folder"])
    assert result.exit_code == 2
    assert f"{name!r} is a name of the model itself" in " ".join(result.output.split())


def test_the_page_beside_it_has_a_key_of_its_own_where_one_is_needed(started: Started) -> None:
    serve("--ui")
    serve("--ui", "--host", "0.0.0.0", "--api-key", "k")
    (open_url, no_key), (url, key) = started.pages
    assert no_key is None
    assert key == started.settings.access.api_keys[-1] != "k"
    assert open_url.startswith("http://127.0.0.1:")
    assert url == f"http://127.0.0.1:{started.address[1]}/v1"
    serve()
    assert len(started.pages) == 2
