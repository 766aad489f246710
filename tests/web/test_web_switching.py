"""One conversation after another on the chat page: Gradio keeps no order between two actions, and a
slow machine or a large conversation makes them overlap. Nothing that is said may get lost.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from browsing import Chat
from fake_server import Script, ScriptedServer

pytestmark = pytest.mark.oracle
pytest.importorskip("gradio", reason="Gradio is not installed (the web extra)")
pytest.importorskip("playwright", reason="Playwright is not installed (the oracle extra)")


# What the page's script asks for under a name that is in `slow` is sent a second and a half later.
_SLOWED = """
window.slow = [];
window.delayed = [];
const { fetch } = window;
window.fetch = async (...asked) => {
  const body = String(asked[1]?.body ?? "");
  const name = window.slow.find((name) => body.includes(`{\\\\"do\\\\":\\\\"${name}`));
  if (name) {
    window.delayed.push(name);
    await new Promise((done) => setTimeout(done, 1500));
  }
  return fetch(...asked);
};
"""


@pytest.fixture
def slowed(chat: Chat) -> Callable[..., None]:
    """Makes the actions of these names slow, from the next load of the page on."""
    chat.page.add_init_script(_SLOWED)

    def slow(*names: str) -> None:
        chat.page.add_init_script(f"window.slow = {list(names)!r};")

    return slow


def send(chat: Chat, text: str) -> None:
    """At once, whatever the page is doing."""
    chat.write(text)
    chat.page.locator("#q-message textarea").press("Enter")


def wait_for_delayed(chat: Chat, name: str) -> None:
    """Until an action that is slow has been asked for."""
    chat.page.wait_for_function("(name) => window.delayed.includes(name)", arg=name)


def test_what_is_sent_before_the_last_conversation_is_open_goes_into_it(
    chat: Chat, slowed: Callable[..., None]
) -> None:
    chat.say("first")
    slowed("open")
    chat.page.goto(chat.address)
    wait_for_delayed(chat, "open")
    send(chat, "quick")
    chat.expect_texts(["first", "first", "quick", "quick"])
    chat.expect_box("")
    assert chat.page.locator(".q-row").count() == 1


def test_what_is_sent_after_new_goes_into_the_new_one(
    chat: Chat, slowed: Callable[..., None]
) -> None:
    slowed("new")
    chat.open()
    chat.say("first")
    chat.page.click("#q-nav .q-new")
    wait_for_delayed(chat, "new")
    chat.write("second")
    chat.page.click("#q-message .submit-button")
    chat.expect_texts(["second", "second"])
    chat.expect_box("")
    chat.page.wait_for_function("() => document.querySelectorAll('.q-row').length == 2")


def test_what_is_written_after_new_stays(chat: Chat, slowed: Callable[..., None]) -> None:
    slowed("new")
    chat.open()
    chat.say("first")
    chat.write("goes with the first")
    chat.page.click("#q-nav .q-new")
    chat.expect_box("")
    wait_for_delayed(chat, "new")
    chat.write("not yet sent")
    chat.page.wait_for_selector(".q-welcome")
    chat.page.wait_for_timeout(300)
    chat.expect_box("not yet sent")
    chat.expect_texts([])


def test_the_conversation_asked_for_last_is_shown(chat: Chat, slowed: Callable[..., None]) -> None:
    chat.say("first")
    slowed("open")
    chat.open()
    chat.page.evaluate("window.delayed.length = 0")
    chat.page.click(".q-row-title >> text=first")
    wait_for_delayed(chat, "open")
    chat.page.click("#q-nav .q-new")
    chat.page.wait_for_selector(".q-welcome")
    send(chat, "second")  # the first one may open now, later than the new one
    chat.page.wait_for_timeout(2500)
    assert "first" not in chat.page.inner_text("#q-past")
    assert chat.page.locator(".q-row").count() == 2


def test_a_conversation_that_cannot_be_opened_keeps_nobody_waiting(chat: Chat) -> None:
    chat.say("first")
    chat.page.evaluate(
        """() => new Promise((done) => {
            const asked = indexedDB.open("qwenkit-conversations", 1);
            asked.onsuccess = () => {
                const open = asked.result.transaction("texts", "readwrite");
                const last = localStorage.getItem("qwenkit-last");
                open.objectStore("texts").put('{"format": "other"}', last);
                open.oncomplete = () => { asked.result.close(); done(); };
            };
        })"""
    )
    chat.open()
    chat.wait_for_text("#q-note", "format")
    chat.say("second")
    chat.expect_texts(["second", "second"])


@pytest.mark.parametrize("again", [False, True])
def test_opening_another_conversation_ends_the_answer(
    chat: Chat, server: ScriptedServer, again: bool
) -> None:
    server.scripts = [Script([f"w{i} " for i in range(4000)], pause_s=0.02)]
    if again:
        server.scripts.insert(0, Script(["short"]))
        chat.say("long one")
        chat.page.click(".q-regenerate")
    else:
        chat.say("long one", wait=False)
    chat.wait_for_text("#q-live", "w5")
    chat.page.click("#q-nav .q-new")
    chat.page.wait_for_selector(".q-welcome")
    chat.page.wait_for_timeout(300)
    chat.expect_texts([])
    chat.page.click(".q-row-title >> text=long one")
    chat.wait_for_text("#q-past", "w5")
    assert chat.conversation["turns"][1]["ended"] == "stopped"
