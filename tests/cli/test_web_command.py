"""`qwenkit web`: its flags, its refusals, the programs it starts; the page itself is stubbed."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from qwenkit.cli import beside, web
from qwenkit.cli.main import app
from qwenkit.errors import MissingDependencyError, QwenkitError
from qwenkit.web import client, serving

runner = CliRunner()


@pytest.fixture(autouse=True)
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """No page is opened: what it would have been is written down."""
    seen: dict[str, Any] = {"opened": []}

    class Server:
        def __init__(self, url: str, api_key: str | None = None) -> None:
            self.url = client.checked_url(url)
            seen.update(url=self.url, api_key=api_key)

    def page_app(server: Any, admission: Any, *, system: str) -> str:
        seen.update(hosts=admission.hosts, users=admission.users, system=system)
        return "app"

    def run(app: str, listening: socket.socket) -> None:
        seen["address"] = listening.getsockname()[:2]

    def share(host: str, port: int) -> str:
        return "https://abc.gradio.live"

    for owner, name, stub in (
        (client, "ChatServer", Server),
        (serving, "page_app", page_app),
        (serving, "run", run),
        (serving, "share", share),
        (beside, "check_page", lambda: None),
        (web.webbrowser, "open", seen["opened"].append),
    ):
        monkeypatch.setattr(owner, name, stub)
    for variable in (beside.KEY_VARIABLE, "QWENKIT_WEB_AUTH"):
        monkeypatch.delenv(variable, raising=False)
    return seen


def call(*args: str) -> tuple[int, str]:
    result = runner.invoke(app, ["web", *args])
    return result.exit_code, result.output


def test_it_opens_on_this_machine_for_the_server_beside(page: dict[str, Any]) -> None:
    code, output = call()
    assert code == 0, output
    host, port = page["address"]
    assert host == "127.0.0.1"
    assert port in range(7860, 7880)
    assert f"http://127.0.0.1:{port}/" in output
    assert (page["url"], page["api_key"]) == ("http://127.0.0.1:8000/v1", None)
    assert "127.0.0.1" in page["hosts"]
    assert page["users"] == {}
    assert page["opened"] == []


def test_every_option_arrives(page: dict[str, Any]) -> None:
    code, output = call(
        "--url", "http://[::1]:9/v1/", "--api-key", "k", "--server-port", "0", "--inbrowser",
        "--server-name", "0.0.0.0", "--auth", "me:a:b", "--auth", "you:c", "--system", "Be kind.",
    )  # fmt: skip
    assert code == 0, output
    assert (page["url"], page["api_key"], page["system"]) == ("http://[::1]:9/v1", "k", "Be kind.")
    assert page["users"] == {"me": "a:b", "you": "c"}
    assert page["hosts"] is None
    assert page["opened"] == [f"http://0.0.0.0:{page['address'][1]}"]


def test_secrets_may_come_from_the_environment(
    page: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(beside.KEY_VARIABLE, "secret-key")
    monkeypatch.setenv("QWENKIT_WEB_AUTH", "me:sesame")
    assert call("--server-port", "0")[0] == 0
    assert (page["api_key"], page["users"]) == ("secret-key", {"me": "sesame"})
    assert "secret-key" not in call("--help")[1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--server-name", "0.0.0.0"], "lets other machines in"),
        (["--server-name", "::"], "lets other machines in"),
        (["--share"], "whole internet"),
        (["--share", "--no-auth"], "whole internet"),
        (["--auth", "me:x", "--no-auth"], "drop one"),
        (["--auth", "me"], "NAME:PASSWORD"),
        (["--auth", ":x"], "NAME:PASSWORD"),
        (["--auth", "me:"], "NAME:PASSWORD"),
        (["--url", "127.0.0.1:8000"], "no address"),
        (["--url", "http://a/v1", "-c", "default"], "give one"),
        (["--cpu-only"], "-c"),
        (["-c", "two words"], "no model name"),
    ],
)
def test_what_cannot_be_is_refused(page: dict[str, Any], args: list[str], words: str) -> None:
    code, output = call(*args)
    assert code == 2
    assert words in " ".join(output.split())
    assert "address" not in page


def test_other_machines_are_let_in_when_that_is_said(page: dict[str, Any]) -> None:
    assert call("--server-name", "0.0.0.0", "--no-auth", "--port", "0")[0] == 0
    assert page["address"][0] == "0.0.0.0"


def test_sharing_warns_and_answers_under_the_public_name(page: dict[str, Any]) -> None:
    code, output = call("--share", "--auth", "me:sesame", "--server-port", "0")
    assert code == 0
    assert "can read" in output
    assert "https://abc.gradio.live" in output
    assert "abc.gradio.live" in page["hosts"]


def test_a_port_in_use_is_an_error_if_it_was_asked_for(page: dict[str, Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, output = call("--server-port", str(port))
    assert code == 2
    assert f"port {port}" in output


class Child:
    """A server process that is there, or ended with `code`."""

    def __init__(self, code: int | None = None) -> None:
        self.returncode, self.ended = code, False

    def poll(self) -> int | None:
        return self.returncode

    def terminate(self) -> None:
        self.ended = True

    def wait(self, timeout: float | None = None) -> int:
        return 0


def test_a_model_is_served_beside_and_ended_with_the_page(
    page: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    child, started = Child(), {}

    def start(model: str, *, api_key: str, port: int, cpu_only: bool) -> Child:
        started.update(model=model, api_key=api_key, port=port, cpu_only=cpu_only)
        return child

    monkeypatch.setattr(beside, "start_server", start)
    monkeypatch.setattr(beside, "wait_until_ready", lambda child, url, *, api_key: None)
    code, output = call("-c", "some/model", "--cpu-only")
    assert code == 0, output
    assert page["address"][1] in range(8000, 8020)
    assert (started["model"], started["cpu_only"]) == ("some/model", True)
    assert page["url"] == f"http://127.0.0.1:{started['port']}/v1"
    assert page["api_key"] == started["api_key"]
    assert len(started["api_key"]) > 20
    assert child.ended


def test_a_server_that_ends_before_it_is_ready_is_an_error() -> None:
    with pytest.raises(QwenkitError, match="status 3"):
        beside.wait_until_ready(Child(3), "http://127.0.0.1:9/v1", api_key="k")  # type: ignore[arg-type]


def test_a_program_beside_gets_its_key_out_of_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []

    def popen(program: list[str], *, env: dict[str, str], stdin: int) -> Child:
        assert stdin == subprocess.DEVNULL
        calls.append((program, env))
        return Child()

    monkeypatch.setattr(beside.subprocess, "Popen", popen)
    monkeypatch.setenv(beside.KEY_VARIABLE, "the parent's own")
    beside.start_page("http://127.0.0.1:8000/v1", api_key="secret", port=7861)
    beside.start_page("http://127.0.0.1:8000/v1")
    beside.start_server("m", api_key="secret", port=8001, cpu_only=True)
    program = [sys.executable, "-m", "qwenkit"]
    assert [given for given, _ in calls] == [
        [*program, "web", "--url", "http://127.0.0.1:8000/v1", "--server-port", "7861"],
        [*program, "web", "--url", "http://127.0.0.1:8000/v1"],
        [*program, "serve", "m", "--host", "127.0.0.1", "--port", "8001", "--cpu-only"],
    ]
    keys = [environment.get(beside.KEY_VARIABLE) for _, environment in calls]
    assert keys == ["secret", None, "secret"]


def test_a_child_is_ended_even_after_an_error() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(KeyError), beside.ending(child):
        raise KeyError
    assert child.returncode is not None


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(beside.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"qwenkit\[web\]"):
        beside.check_page()
