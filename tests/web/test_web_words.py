"""Both languages say everything; exports keep what was said; addresses are checked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwenkit.errors import UsageError
from qwenkit.types.messages import ToolCall
from qwenkit.web.client import checked_url, is_on_this_machine
from qwenkit.web.conversation import Conversation, Turn
from qwenkit.web.export import KINDS, export, fenced, file_name
from qwenkit.web.request import SETTINGS
from qwenkit.web.stored import from_json
from qwenkit.web.words import FOR_SCRIPT, LANGUAGES, WORDS, known_language, script_words, word

WEB = Path(__file__).parents[2] / "src" / "qwenkit" / "web"


def test_both_languages_have_the_same_places() -> None:
    for name, (english, chinese) in WORDS.items():
        assert english
        assert chinese
        assert set(re.findall(r"{\w+}", english)) == set(re.findall(r"{\w+}", chinese)), name


def test_every_word_is_used_and_every_used_word_is_there() -> None:
    source = "\n".join(
        path.read_text("utf-8") for path in WEB.glob("*.py") if path.name != "words.py"
    )
    used = (
        set(re.findall(r"""["'](\w+)["']""", source)) | set(FOR_SCRIPT) | {s.name for s in SETTINGS}
    )
    assert set(WORDS) - used == set()
    assert set(re.findall(r'word\("(\w+)"', source)) - set(WORDS) == set()
    script = (WEB / "page.js").read_text("utf-8")
    said = set(re.findall(r"words\.(\w+)", script)) | set(re.findall(r': "(\w+)"', script))
    assert set(FOR_SCRIPT) - said == set()
    assert set(re.findall(r"words\.(\w+)", script)) - set(script_words("en")) == set()


def test_a_word_takes_values_that_hold_braces() -> None:
    assert word("no_server", "en", url="{0}{x}") == "No server answers at {0}{x}."


@pytest.mark.parametrize(
    ("given", "accepted", "language"),
    [
        ("zh", "en", "zh"), (None, "zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("", "en-GB, zh", "en"),
        (None, "fr, zh-TW", "zh"), (None, "", "en"), ("klingon", "de", "en"),
    ],
)  # fmt: skip
def test_the_language_is_the_chosen_one_or_the_browsers(
    given: str, accepted: str, language: str
) -> None:
    assert known_language(given, accepted) == language
    assert language in LANGUAGES


CONVERSATION = Conversation(
    id="a1",
    title="On <b> & `x`",
    system="Be ```kind```.",
    turns=(
        Turn(role="user", text="What is <b>?\n\n```\ncode\n```"),
        Turn(role="assistant", text="**Bold**", reasoning="Hm.", model="m",
             calls=(ToolCall("f", '{"a": 1}', id="c1"),)),
        Turn(role="tool", text="```", call_id="c1"),
        Turn(role="assistant", text="", ended="error", error="gone"),
    ),
)  # fmt: skip


def test_an_export_as_json_comes_back_whole() -> None:
    name, kind, text = export(CONVERSATION, "json", language="en")
    assert (name, kind) == ("On-b-x.json", "application/json")
    assert from_json(text) == CONVERSATION


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_export_as_markdown_has_all_that_was_said(language: str) -> None:
    name, kind, text = export(CONVERSATION, "markdown", language=language)
    assert (name, kind) == ("On-b-x.md", "text/markdown")
    for said in (
        *(turn.text for turn in CONVERSATION.turns),
        "Hm.",
        '{"a": 1}',
        "Be ```kind```.",
        "gone",
    ):
        assert said in text
    assert f"## {word('assistant', language)} (m)" in text
    assert set(KINDS) == {"markdown", "json"}


def test_a_fence_is_longer_than_any_inside() -> None:
    assert fenced("a ```` b") == "`````\na ```` b\n`````"
    assert fenced("a") == "```\na\n```"


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("", "conversation"),
        ("../../etc/passwd", "etc-passwd"),
        ("你好 world?", "你好-world"),
        ("a" * 99, "a" * 60),
        ("\u202e.exe\0", "exe"),
        ("---", "conversation"),
    ],
)
def test_a_file_is_named_by_its_title(title: str, name: str) -> None:
    assert file_name(title) == name


def test_an_address_of_a_server_is_checked() -> None:
    assert checked_url("http://127.0.0.1:8000/v1/") == "http://127.0.0.1:8000/v1"
    for wrong in (
        "",
        "127.0.0.1:8000",
        "ftp://a/v1",
        "http://",
        "http://a:b/v1",
        "http://a/v1?x=1",
        "http://[",
    ):
        with pytest.raises(UsageError, match="no address"):
            checked_url(wrong)


def test_a_proxy_is_asked_for_other_machines_only() -> None:
    assert is_on_this_machine("http://127.8.0.1:1/v1")
    assert is_on_this_machine("http://localhost/v1")
    assert is_on_this_machine("http://[::1]:1/v1")
    assert not is_on_this_machine("http://192.168.1.5/v1")
    assert not is_on_this_machine("http://localhost.example/v1")
