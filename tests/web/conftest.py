"""The chat page as a process of its own, and browsers that have never seen it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import Chat, browser, running_page
from fake_server import ScriptedServer


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def address(server: ScriptedServer, folder: Path) -> Iterator[str]:
    with running_page(folder, "web", "--url", server.url, "--server-port", "0") as found:
        yield found
        asked = set((folder / "asked.txt").read_text().split())
        assert asked <= {"127.0.0.1", "localhost", "None"}, "the page asked for other machines"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture
def chat(chromium: Any, address: str, server: ScriptedServer) -> Iterator[Chat]:
    """A browser that has never seen the page."""
    server.scripts.clear()
    server.requests.clear()
    context = chromium.new_context(viewport={"width": 1200, "height": 800}, locale="en-GB")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened = Chat(context, address)
    yield opened
    opened.check_harmless()
    context.close()
