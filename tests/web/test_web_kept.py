"""What the browser keeps of the chat page: conversations, drafts, settings; exports and imports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browsing import RAW, Chat
from fake_server import Script, ScriptedServer

pytestmark = pytest.mark.oracle
pytest.importorskip("gradio", reason="Gradio is not installed (the web extra)")
pytest.importorskip("playwright", reason="Playwright is not installed (the oracle extra)")


def test_what_is_being_written_outlives_a_reload(chat: Chat) -> None:
    chat.write("not yet sent")
    chat.open()
    chat.expect_box("not yet sent")
    chat.say("sent")
    chat.page.wait_for_timeout(300)
    chat.open()
    chat.wait_for_text("#q-past", "sent")
    chat.expect_box("")


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
