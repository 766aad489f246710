"""The page with this package's own server and the default model, as real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from browsing import Chat, browser, running_page

pytestmark = pytest.mark.oracle
for _package in ("gradio", "playwright", "fastapi"):
    pytest.importorskip(_package, reason=f"{_package} is not installed")


@pytest.mark.parametrize(
    "arguments",
    [
        ("web", "-c", "default", "--cpu-only", "--server-port", "0"),
        ("serve", "default", "--port", "0", "--ui", "--api-key", "a-key-of-the-test"),
    ],
    ids=["web -c", "serve --ui"],
)
def test_a_model_answers_on_the_page(arguments: tuple[str, ...], tmp_path: Path) -> None:
    with browser() as chromium, running_page(tmp_path, *arguments) as address:
        chat = Chat(chromium.new_context(viewport={"width": 1200, "height": 800}), address)
        chat.page.click("#q-head .q-toggle-side")
        chat.page.fill("#q-set-temperature input", "0")
        chat.page.fill("#q-set-max_tokens input", "24")
        chat.say("What is the capital of France?")
        assert "Paris" in chat.texts[1]
        chat.say("And of Italy?")
        assert chat.texts[3]
        stats = chat.page.locator(".q-stats").last.inner_text()
        assert "tokens read" in stats
        assert "tokens/s" in stats
        chat.check_harmless()
