"""Row 27 of the reliability board: 60 hostile texts in every place where a text is shown, in a real
browser. Scripts that ran: 0. Requests to anywhere else: 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import Chat, Outside, browser, running_page
from fake_server import Script, ScriptedServer
from hostile_texts import hostile

pytestmark = pytest.mark.oracle
pytest.importorskip("gradio", reason="Gradio is not installed (the web extra)")
pytest.importorskip("playwright", reason="Playwright is not installed (the oracle extra)")

_LONG = 1_000_000


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as running:
        yield running


@pytest.fixture(scope="module")
def chat(server: ScriptedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    folder: Path = tmp_path_factory.mktemp("hostile")
    page = ("web", "--url", server.url, "--server-port", "0")
    with running_page(folder, *page) as address, browser() as chromium:
        opened = Chat(chromium.new_context(viewport={"width": 1200, "height": 800}), address)
        opened.page.set_default_timeout(60_000)
        yield opened
        asked = set((folder / "asked.txt").read_text().split())
        assert asked <= {"127.0.0.1", "localhost", "None"}


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    opened = Outside()
    yield opened
    opened.close()


@pytest.mark.parametrize("number", range(60))
def test_a_hostile_text_does_nothing(
    chat: Chat, server: ScriptedServer, outside: Outside, number: int
) -> None:
    text = hostile(outside.address)[number]
    thoughts, calls = (text, [(text, text)]) if len(text) < _LONG else ("", [])
    server.scripts = [Script([text], thoughts, calls=calls), Script([text])]
    chat.say(text)  # shown as message, title, reply, thoughts, a call's name and arguments
    assert chat.texts == [text, text]
    chat.check_harmless("the first turn")
    if calls:
        chat.say(text + " ")  # what the tool returned, and the answer to it
        assert chat.texts == [text, text, text + " ", text]
        server.scripts = [Script(status=400, message=text)]
        chat.say(text)  # what the server says of an error
        chat.check_harmless("all turns")
    assert server.requests[0]["messages"] == [{"role": "user", "content": text}]
    server.requests.clear()
    click_what_can_be_clicked(chat)
    chat.check_harmless("after clicks")
    shown = chat.page.evaluate(
        """() => [...document.querySelectorAll("#q-head, #q-message, #q-past")].every((part) => {
            const { width, height } = part.getBoundingClientRect();
            return width > 0 && height > 0 && width <= innerWidth;
        }) && document.elementFromPoint(600, 775).closest("#q-message, #q-foot") !== null"""
    )
    assert shown, "the page itself is covered or pushed away"
    assert outside.asked == []
    chat.page.click("#q-nav .q-new")
    chat.page.wait_for_selector(".q-welcome")


def click_what_can_be_clicked(chat: Chat) -> None:
    """Everything in the conversation but links that lead to other pages by the user's own will."""
    chat.page.evaluate(
        """() => {
            const all = document.querySelectorAll("#q-past *");
            for (const one of [...all].slice(0, 2000))
                if (!one.closest("a[href], button, summary"))
                    one.dispatchEvent(new MouseEvent("click", { bubbles: true }));
        }"""
    )


def test_hostile_conversations_that_were_kept_do_nothing(chat: Chat, outside: Outside) -> None:
    """The list of titles, and the page loaded anew."""
    chat.open()
    chat.page.click("#q-nav .q-new")  # not into the conversation of 10 MB that was the last one
    chat.page.wait_for_selector(".q-welcome")
    texts = [text for text in hostile(outside.address) if len(text) < _LONG][::9]
    for text in texts:
        chat.say(text)
        chat.page.click("#q-nav .q-new")
        chat.page.wait_for_selector(".q-welcome")
    chat.open()
    rows = chat.page.locator(".q-row-title")
    assert rows.count() >= len(texts)
    rows.nth(3).click()
    chat.page.wait_for_selector(".q-turns")
    chat.check_harmless("the list")
    assert outside.asked == []
