"""The chat page in a real browser: what a person says there, and what comes back."""

from __future__ import annotations

from typing import Any

import pytest
from browsing import RAW, Chat
from fake_server import Script, ScriptedServer

pytestmark = pytest.mark.oracle
pytest.importorskip("gradio", reason="Gradio is not installed (the web extra)")
pytest.importorskip("playwright", reason="Playwright is not installed (the oracle extra)")

USAGE = {"prompt_tokens": 1234, "completion_tokens": 8, "total_tokens": 1242}


def test_a_message_is_sent_and_the_answer_streams(chat: Chat, server: ScriptedServer) -> None:
    server.scripts = [Script([f"part{i} " for i in range(40)], pause_s=0.05, usage=USAGE)]
    chat.say(RAW, wait=False)
    chat.wait_for_text("#q-live", "part3")
    assert "part39" not in chat.page.inner_text("#q-live")
    chat.wait_for_answer(0)
    chat.expect_texts([RAW, "".join(f"part{i} " for i in range(40))])
    assert chat.page.locator(".q-user .q-plain").inner_text() == RAW
    chat.expect_box("")
    stats = chat.page.inner_text(".q-stats")
    assert "1,234 tokens read" in stats
    assert "8 written" in stats
    assert "tokens/s" in stats
    assert server.requests[0]["model"] == "toy-1"


def test_history_goes_back_as_it_was_said(chat: Chat, server: ScriptedServer) -> None:
    server.scripts = [Script([RAW]), Script(["ok"])]
    chat.say(RAW)
    chat.say("more")
    assert server.requests[1]["messages"] == [
        {"role": "user", "content": RAW},
        {"role": "assistant", "content": RAW},
        {"role": "user", "content": "more"},
    ]


def test_stopping_keeps_what_was_said_and_hangs_up(chat: Chat, server: ScriptedServer) -> None:
    before = server.hung_up
    server.scripts = [Script([f"w{i} " for i in range(4000)], pause_s=0.02)]
    chat.say("go", wait=False)
    chat.wait_for_text("#q-live", "w5")
    chat.page.click("#q-message .stop-button")
    chat.wait_for_answer(0)
    assert chat.texts[1].startswith("w0 w1 w2")
    assert "You stopped it here." in chat.page.inner_text("#q-past")
    for _ in range(100):
        if server.hung_up > before:
            break
        chat.page.wait_for_timeout(50)
    assert server.hung_up == before + 1


def test_closing_the_page_hangs_up(
    chromium: Any, address: str, server: ScriptedServer, chat: Chat
) -> None:
    before = server.hung_up
    server.scripts = [Script([f"w{i} " for i in range(9000)], pause_s=0.02)]
    context = chromium.new_context()
    other = Chat(context, address)
    other.say("go", wait=False)
    other.wait_for_text("#q-live", "w5")
    context.close()
    for _ in range(300):
        if server.hung_up > before:
            break
        chat.page.wait_for_timeout(100)
    assert server.hung_up == before + 1


def test_answering_again_editing_and_taking_back(chat: Chat, server: ScriptedServer) -> None:
    server.scripts = [Script(["one"]), Script(["two"]), Script(["three"]), Script(["four"])]
    chat.say("a")
    chat.page.click(".q-regenerate")
    chat.wait_for_text("#q-past", "two")
    chat.expect_texts(["a", "two"])
    chat.say("b")
    chat.expect_texts(["a", "two", "b", "three"])
    chat.page.click("#q-turn-0 .q-edit")
    chat.wait_for_text("#q-note", "You are changing message 1")
    chat.expect_box("a")
    chat.say("A!")
    chat.expect_texts(["A!", "four"])
    assert [m["content"] for m in server.requests[-1]["messages"]] == ["A!"]
    chat.page.click("#q-turn-1 .q-edit")
    chat.wait_for_text("#q-note", "You are changing message 2")
    chat.expect_box("four")
    chat.write("4")
    chat.page.locator("#q-message textarea").press("Enter")
    chat.expect_texts(["A!", "4"])
    chat.page.click("#q-turn-1 .q-edit")
    chat.wait_for_text("#q-note", "You are changing message 2")
    chat.page.click(".q-cancel")
    chat.page.wait_for_selector(".q-cancel", state="detached")
    chat.expect_box("")
    chat.page.click(".q-undo")
    chat.page.wait_for_selector(".q-welcome")
    chat.expect_texts([])
    chat.expect_box("A!")


def test_a_tool_call_is_shown_and_its_result_goes_on(chat: Chat, server: ScriptedServer) -> None:
    arguments = '{"city": "<b>Paris</b>"}'
    server.scripts = [
        Script(
            [], thoughts="Let me look.", calls=[("get_weather", arguments)], finish="tool_calls"
        ),
        Script(["It is warm."]),
    ]
    chat.say("Weather?")
    call = chat.page.locator(".q-call")
    assert "get_weather" in call.inner_text()
    assert '"city": "<b>Paris</b>"' in call.inner_text()
    assert "Let me look." in chat.page.inner_text(".q-thoughts")
    placeholder = chat.page.get_attribute("#q-message textarea", "placeholder")
    assert placeholder == "What get_weather returned"
    chat.say("22 °C")
    assert chat.texts[-1] == "It is warm."
    call_message, result = server.requests[-1]["messages"][-2:]
    assert call_message["tool_calls"][0]["function"]["arguments"] == arguments
    assert result == {"role": "tool", "content": "22 °C", "tool_call_id": "call-0"}


def test_markdown_code_and_formulas_are_drawn(chat: Chat, server: ScriptedServer) -> None:
    code = "def f(a):\n\tif a < 1:\n\n\t\treturn '&amp;'\n"
    reply = f"**bold** $\\frac{{a}}{{b}}$ $5\n\n```python\n{code}```\n\n|a|b|\n|-|-|\n|1|2|"
    server.scripts = [Script([reply[i : i + 7] for i in range(0, len(reply), 7)])]
    chat.say("show")
    assert chat.page.inner_text(".q-said strong") == "bold"
    assert chat.page.locator(".q-said .katex .mfrac").count() == 1
    assert chat.page.locator(".q-said td").count() == 2
    chat.page.click(".q-copy-code")
    chat.wait_for_text(".q-copy-code", "Copied")
    assert chat.page.evaluate("navigator.clipboard.readText()") == code
    chat.page.click(".q-assistant .q-copy")
    chat.page.wait_for_selector(".q-assistant .q-copy.q-done")
    assert chat.page.evaluate("navigator.clipboard.readText()") == reply


def test_what_goes_wrong_is_said(chat: Chat, server: ScriptedServer) -> None:
    server.scripts = [
        Script(status=429, message="too <b>many</b> requests"),
        Script(["so far"], cuts_off=True),
        Script(["fine"]),
    ]
    chat.say("a")
    assert "429" in chat.page.inner_text(".q-error")
    assert "too <b>many</b> requests" in chat.page.inner_text(".q-error")
    chat.page.click(".q-regenerate")
    chat.wait_for_text("#q-past", "so far")
    chat.page.wait_for_selector(".q-regenerate")
    chat.page.click(".q-regenerate")
    chat.wait_for_text("#q-past", "fine")
    chat.expect_texts(["a", "fine"])


def test_a_message_while_an_answer_comes_is_not_lost(chat: Chat, server: ScriptedServer) -> None:
    server.scripts = [Script([f"w{i} " for i in range(60)], pause_s=0.05)]
    chat.say("go", wait=False)
    chat.wait_for_text("#q-live", "w2")
    chat.say("next", wait=False)
    chat.page.wait_for_timeout(300)
    chat.wait_for_answer(0)
    assert len(chat.texts) == 2
    chat.expect_box("next")


def test_enter_that_ends_a_composed_word_sends_nothing(chat: Chat, server: ScriptedServer) -> None:
    chat.write("ni")
    chat.page.evaluate(
        """() => {
            const box = document.querySelector("#q-message textarea");
            const enter = { key: "Enter", keyCode: 229, isComposing: true, bubbles: true };
            for (const kind of ["keydown", "keypress"])
                box.dispatchEvent(new KeyboardEvent(kind, { ...enter, cancelable: true }));
        }"""
    )
    chat.page.wait_for_timeout(400)
    assert server.requests == []
    chat.page.locator("#q-message textarea").press("Shift+Enter")
    chat.page.locator("#q-message textarea").press("a")
    chat.expect_box("ni\na")


def test_what_a_person_says_wraps(chat: Chat, server: ScriptedServer) -> None:
    calls = [("look", '{"word": "' + "w" * 400 + '"}')]
    server.scripts = [
        Script(["**ok**"], thoughts="thought " * 60),
        Script([], calls=calls, finish="tool_calls"),
    ]
    said = "word " * 60 + "END\n\tindented " + "x" * 400
    chat.say(said)
    chat.say("call")
    assert chat.page.locator(".q-user .q-plain").first.inner_text() == said
    chat.page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    for width in (1200, 375):
        chat.page.set_viewport_size({"width": width, "height": 800})
        for place in (".q-user", ".q-thoughts", ".q-call"):
            widths = chat.page.locator(f"{place} .q-plain").evaluate_all(
                "(all) => all.map((e) => [e.scrollWidth, e.clientWidth])"
            )
            assert widths, place
            assert all(needed <= there for needed, there in widths), (width, place, widths)
        bubble = chat.page.locator(".q-bubble").first.bounding_box()
        assert bubble["x"] >= 0
        assert bubble["x"] + bubble["width"] <= width


def test_a_phone_shows_it_all(chromium: Any, address: str, server: ScriptedServer) -> None:
    server.scripts = [Script(["Some `code` and $x^2$.\n\n```\n" + "long " * 60 + "\n```"])]
    context = chromium.new_context(
        viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, locale="zh-CN"
    )
    chat = Chat(context, address)
    assert "有什么可以帮您" in chat.page.inner_text(".q-welcome")
    chat.say("你好，" * 40)
    for part in ("html", "#q-scroll", "#q-main"):
        assert chat.page.locator(part).evaluate("(e) => e.scrollWidth > innerWidth") is False
    box = chat.page.locator("#q-message").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    assert box["y"] + box["height"] <= 740
    chat.page.tap("#q-head .q-toggle-nav")
    chat.wait_for_text(".q-row-title", "你好")
    chat.page.tap("#q-nav .q-new")
    chat.page.wait_for_selector(".q-welcome")
    chat.page.wait_for_selector("#q-nav", state="hidden")
    chat.page.tap("#q-head .q-toggle-side")
    chat.page.locator("#q-set-temperature input").wait_for()
    chat.page.tap(".q-close")
    chat.page.wait_for_selector("#q-side", state="hidden")
    chat.check_harmless()
    context.close()
