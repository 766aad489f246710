"""The chat page in a real browser: everything that a person does with it."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from browsing import Chat, browser, running_page
from fake_server import Script, ScriptedServer

pytestmark = pytest.mark.oracle
pytest.importorskip("gradio", reason="Gradio is not installed (the web extra)")
pytest.importorskip("playwright", reason="Playwright is not installed (the oracle extra)")

USAGE = {"prompt_tokens": 1234, "completion_tokens": 8, "total_tokens": 1242}
RAW = '<b>1 < 2 &amp; "q"</b> **x** $y$ `z`\n\t\\(a\\) 100 % 你好'


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


def test_what_is_being_written_outlives_a_reload(chat: Chat) -> None:
    chat.write("not yet sent")
    chat.open()
    chat.expect_box("not yet sent")
    chat.say("sent")
    chat.page.wait_for_timeout(300)
    chat.open()
    chat.wait_for_text("#q-past", "sent")
    chat.expect_box("")


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


def test_conversations_are_kept_across_a_reload(chat: Chat, server: ScriptedServer) -> None:
    server.scripts = [Script(["first answer"]), Script(["second answer"])]
    chat.say("first question")
    chat.page.click("#q-nav .q-new")
    chat.page.wait_for_selector(".q-welcome")
    chat.say("second question")
    chat.page.wait_for_function("() => document.querySelectorAll('.q-row').length == 2")
    chat.open()
    chat.wait_for_text("#q-past", "second answer")
    titles = chat.page.locator(".q-row-title").all_inner_texts()
    assert titles == ["second question", "first question"]
    chat.page.click(".q-row-title >> text=first question")
    chat.wait_for_text("#q-past", "first answer")
    chat.expect_texts(["first question", "first answer"])
    chat.say("and more")
    assert len(server.requests[-1]["messages"]) == 3
    rename_and_delete(chat)


def rename_and_delete(chat: Chat) -> None:
    row = chat.page.locator(".q-row").filter(has_text="second question")
    row.hover()
    row.locator(".q-rename").click()
    chat.page.keyboard.type("Renamed <i>")
    chat.page.keyboard.press("Enter")
    chat.wait_for_text(".q-row-title", "Renamed <i>")
    row = chat.page.locator(".q-row").filter(has_text="Renamed")
    row.hover()
    row.locator(".q-delete").click()
    chat.wait_for_text(".q-row", "Delete for good?")
    chat.page.locator(".q-sure").click()
    chat.page.wait_for_function("() => document.querySelectorAll('.q-row').length == 1")
    chat.open()
    assert chat.page.locator(".q-row").count() == 1


def test_an_answer_cut_off_by_a_reload_is_kept(chat: Chat, server: ScriptedServer) -> None:
    server.scripts = [Script([f"w{i} " for i in range(4000)], pause_s=0.02)]
    chat.say("go", wait=False)
    chat.page.wait_for_function(
        "() => JSON.parse(document.querySelector('#q-current input').value).turns.length == 2"
    )
    chat.page.wait_for_timeout(300)
    chat.open()
    chat.wait_for_text("#q-past", "You stopped it here.")
    assert chat.texts[1].startswith("w0 w1")


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


def test_languages_and_light_and_dark_are_switched_and_kept(chat: Chat) -> None:
    assert chat.page.evaluate("document.documentElement.lang") == "en"
    chat.page.click("#q-head .q-language")
    chat.wait_for_text(".q-welcome", "有什么可以帮您")
    assert chat.page.get_attribute("#q-message textarea", "placeholder") == "输入消息"
    assert chat.page.inner_text("#q-nav .q-new") == "新建对话"
    is_dark = chat.page.evaluate("document.body.classList.contains('dark')")
    chat.page.click("#q-head .q-dark")
    chat.open()
    chat.wait_for_text(".q-welcome", "有什么可以帮您")
    assert chat.page.evaluate("document.body.classList.contains('dark')") is not is_dark
    chat.page.click("#q-head .q-language")
    chat.wait_for_text(".q-welcome", "What can I do for you?")


def test_settings_are_sent_and_kept(chat: Chat, server: ScriptedServer) -> None:
    chat.page.click("#q-head .q-toggle-side")
    fields = {"temperature": "0.5", "max_tokens": "77", "top_k": "20", "seed": "3"}
    for name, value in fields.items():
        box = chat.page.locator(f"#q-set-{name} input")
        box.click()
        chat.page.keyboard.type(value)
        box.press("Tab")
    chat.page.fill("#q-set-system_prompt textarea", "Be <kind>.")
    chat.page.fill("#q-set-stop textarea", "END")
    chat.page.locator("#q-set-stop textarea").press("Tab")
    chat.page.wait_for_timeout(500)
    chat.say("hi")
    sent = server.requests[-1]
    assert sent["messages"][0] == {"role": "system", "content": "Be <kind>."}
    assert {k: sent[k] for k in ("temperature", "max_tokens", "top_k", "seed", "stop")} == {
        "temperature": 0.5, "max_tokens": 77, "top_k": 20, "seed": 3, "stop": ["END"],
    }  # fmt: skip
    chat.open()
    chat.wait_for_text("#q-past", "hi")
    assert chat.page.input_value("#q-set-temperature input") == "0.5"
    assert chat.page.input_value("#q-set-stop textarea") == "END"
    chat.page.fill("#q-set-tools textarea", "{not json")
    chat.say("hi again", wait=False)
    chat.wait_for_text("#q-note", "tools: not JSON")
    chat.expect_box("hi again")


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


def test_exports_and_imports(chat: Chat, server: ScriptedServer, tmp_path: Path) -> None:
    server.scripts = [Script([RAW])]
    chat.say(RAW)
    with chat.page.expect_download() as markdown:
        chat.page.click("#q-head .q-export")
    text = Path(markdown.value.path()).read_text(encoding="utf-8")
    assert text.count(RAW) == 2
    assert markdown.value.suggested_filename.endswith(".md")
    with chat.page.expect_download() as exported:
        chat.page.click(".q-export-json")
    file = tmp_path / "conversation.json"
    exported.value.save_as(file)
    assert json.loads(file.read_text(encoding="utf-8")) == chat.conversation
    before = chat.conversation
    with chat.page.expect_file_chooser() as chooser:
        chat.page.click(".q-import")
    chooser.value.set_files(file)
    chat.page.wait_for_function("() => document.querySelectorAll('.q-row').length == 2")
    assert chat.conversation["turns"] == before["turns"]
    assert chat.conversation["id"] != before["id"]


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
