"""Who may see the chat page at all, and what it says where no server answers."""

from __future__ import annotations

import base64
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from browsing import Chat, running_page

pytestmark = pytest.mark.oracle
pytest.importorskip("gradio", reason="Gradio is not installed (the web extra)")
pytest.importorskip("playwright", reason="Playwright is not installed (the oracle extra)")


def test_a_password_guards_the_page_and_a_missing_server_is_named(
    chromium: Any, tmp_path: Path
) -> None:
    options = ("--url", "http://127.0.0.1:9/v1", "--server-port", "0", "--auth", "me:sesame")
    with running_page(tmp_path, "web", *options) as address:
        assert answer(address)[0] == 401
        told = {"Authorization": "Basic " + base64.b64encode(b"me:sesame").decode()}
        status, headers = answer(address, **told)
        assert status == 200
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "uvicorn" not in str(headers)
        assert answer(address, Host="evil.example", **told)[0] == 421
        assert answer(address, Origin="http://evil.example", **told)[0] == 403
        for path in ("gradio_api/file=/etc/passwd", "gradio_api/info", "gradio_api/upload", "docs"):
            assert answer(address + path, **told)[0] == 404
        credentials = {"username": "me", "password": "sesame"}
        context = chromium.new_context(http_credentials=credentials, locale="en-GB")
        chat = Chat(context, address)
        chat.wait_for_text("#q-note", "No server answers at http://127.0.0.1:9/v1.")
        chat.say("hi", wait=False)
        chat.wait_for_text("#q-note", "Choose a model first.")
        chat.expect_box("hi")
        chat.check_harmless()
        context.close()


def answer(url: str, **headers: str) -> tuple[int, Message]:
    """(status, headers) of a request outside any browser."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as found:
            return found.status, found.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers
