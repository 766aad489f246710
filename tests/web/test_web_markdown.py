"""Markdown becomes HTML that shows every character and can do nothing."""

from __future__ import annotations

import time
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest
from hostile_texts import hostile
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.types.messages import ToolCall
from qwenkit.web.conversation import Conversation, Stats, Turn
from qwenkit.web.markdown import (
    DISPLAY_MATH,
    INLINE_MATH,
    LONGEST,
    is_drawable,
    is_link,
    plain,
    render,
    safe,
)
from qwenkit.web.transcript import coming, stats_words, transcript

TAGS = {
    "a",
    "bdi",
    "blockquote",
    "br",
    "button",
    "code",
    "details",
    "div",
    "em",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "i",
    "li",
    "ol",
    "p",
    "pre",
    "s",
    "span",
    "strong",
    "summary",
    "table",
    "tbody",
    "td",
    "th",
    "thead",
    "tr",
    "ul",
}
ATTRIBUTES = {"class", "dir", "href", "id", "open", "start", "style", "title", "type"}
VOID = {"br", "hr"}


class Reader(HTMLParser):
    """Reads HTML as a browser does, and says what of it could act."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.wrong: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in TAGS:
            self.wrong.append(tag)
        for name, value in attrs:
            if name not in ATTRIBUTES:
                self.wrong.append(f"{tag} {name}")
            if name == "href" and urlsplit(value or "").scheme not in ("http", "https", "mailto"):
                self.wrong.append(f"{tag} {name}={value}")
            if name == "style" and value not in (
                "text-align:right",
                "text-align:left",
                "text-align:center",
            ):
                self.wrong.append(f"{tag} {name}={value}")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.wrong.append("comment")

    def handle_decl(self, decl: str) -> None:
        self.wrong.append("declaration")

    def unknown_decl(self, data: str) -> None:
        self.wrong.append("declaration")


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


def check_harmless(html: str) -> str:
    """The text of `html`, once it is found harmless."""
    reader = read(html)
    assert reader.wrong == []
    assert reader.open == []
    assert "\n" not in html, "Gradio would read it as Markdown again"
    assert "\t" not in html
    assert "%%%" not in html, "Gradio would take it for one of its own marks"
    return reader.text


def test_there_are_sixty_hostile_texts() -> None:
    assert len(set(hostile("http://x"))) == 60


@pytest.mark.parametrize("number", range(60))
def test_hostile_texts_become_harmless_html(number: int) -> None:
    text = hostile("http://127.0.0.1:9")[number]
    calls = (ToolCall(text, text, id=text), ToolCall(text, f'{{"a": {text[:100]!r}}}'))
    turns = (
        Turn(role="user", text=text),
        Turn(role="assistant", text=text, reasoning=text, calls=calls, ended=text, error=text),
        Turn(role="tool", text=text, call_id=text),
        Turn(role="assistant", text="", ended="error", error=text),
    )
    began_s = time.monotonic()
    conversation = Conversation(id="a", title=text, system=text, turns=turns)
    shown = check_harmless(transcript(conversation, language="en"))
    check_harmless(coming(turns[1], language="zh"))
    assert len(shown) < 500_000
    assert time.monotonic() - began_s < 20


@given(st.text(max_size=200) | st.text("<>&\"'`*_[]()!$\\{}#|- \n\tajs:%", max_size=200))
def test_any_text_becomes_harmless_html(text: str) -> None:
    check_harmless(render(text))
    check_harmless(plain(text))


@given(
    st.text(
        st.characters(exclude_categories=("Cs",), exclude_characters="\0\r\uefe0\uefe1\uefe2\uefe3")
    )
)
def test_plain_text_is_shown_to_the_letter(text: str) -> None:
    assert check_harmless(plain(text)) == text


def test_markdown_is_drawn() -> None:
    html = render("# T\n\n*a* **b** ~~c~~ `d` [e](https://f.g)\n- x\n1. y\n\n|h|\n|-:|\n|z|\n\n> q")
    for part in (
        "<h1>T</h1>",
        "<em>a</em>",
        "<strong>b</strong>",
        "<s>c</s>",
        "<code>d</code>",
        '<a href="https://f.g" title="https://f.g">e</a>',
        "<li>x</li>",
        "<ol>",
        "<td ",
        "<blockquote>",
    ):
        assert part in html


def test_a_line_is_a_line() -> None:
    assert render("one\ntwo") == "<p>one<br />two</p>"


def test_code_keeps_its_characters_and_has_a_button() -> None:
    source = "def f(a):\n\tif a < 1:\n\n\t\treturn '<b>&amp;</b>'  # 100 %\n"
    for language in ("python", "", "no-such-language", "html", "json", "mermaid"):
        html = render(f"```{language}\n{source}```", copy="复制")
        assert "复制</button>" in html
        assert check_harmless(html) == f"{language}复制{source}"
    assert '<span class="k">def</span>' in render(f"```python\n{source}```")
    assert "span class" not in render(f"```mermaid\n{source}```")


def test_html_is_text() -> None:
    assert check_harmless(render("<b>bold</b> & <script>")) == "<b>bold</b> & <script>"


def test_a_picture_is_a_link_to_it() -> None:
    html = render(
        "![a cat](http://x.y/cat.png) ![](https://x.y/z) ![bad](data:image/png;base64,AA)"
    )
    assert html.count("q-image") == 2
    assert ">a cat</a>" in html
    assert "![bad]" in html


@pytest.mark.parametrize(
    ("url", "may"),
    [
        ("https://a.b/c?d#e", True),
        ("HTTP://a.b", True),
        ("mailto:a@b.c", True),
        ("javascript:alert(1)", False),
        ("data:text/html,x", False),
        ("//a.b", False),
        ("/logout", False),
        ("#x", False),
        ("file:///etc/passwd", False),
        ("java\tscript:x", False),
        ("http://[", False),
        ("https://a.b/\x00", False),
        ("blob:http://a/b", False),
        ("", False),
    ],
)
def test_links_lead_to_the_web_or_to_mail(url: str, may: bool) -> None:
    assert is_link(url) is may


def formulas_in(text: str) -> list[str]:
    found, rest = [], render(text)
    for opening, closing in (INLINE_MATH, DISPLAY_MATH):
        for piece in rest.split(opening)[1:]:
            found.append(read(piece.split(closing)[0]).text)
    return found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("is $a_1 < b$ and", ["a_1 < b"]),
        (r"is \(a\_b\) and \[c\] too", [r"a\_b", "c"]),
        ("$$\\frac{a}{b}$$", ["\\frac{a}{b}"]),
        ("\\[\na \\\\\nb\n\\]\nmore", ["a \\\\\nb"]),
        ("- x:\n  $$\n  a\n  $$", ["a"]),
        ("\\begin{align*}\na &= b\n\\end{align*}", ["\\begin{align*}\na &= b\n\\end{align*}"]),
        ("it costs $5 and $6", []),
        ("$ a $ and $$ $$ and $", []),
        ("`$a$` and \\$a\\$", []),
        ("```\n$$a$$\n```", []),
        ("$a\n\nb$", []),
        ("$*a*$ *b*", ["*a*"]),
        (f"{INLINE_MATH[0]}a{INLINE_MATH[1]}", []),
    ],
)
def test_formulas_are_found_and_money_is_not(text: str, found: list[str]) -> None:
    assert formulas_in(text) == found


def test_formulas_that_would_hold_a_browser_up_are_shown_as_text() -> None:
    for source in (
        "{" * 100 + "}" * 100,
        "\\sqrt" * 60 + "a",
        "x" * 3001,
        "\\left(" * 70,
        "^" * 300,
    ):
        assert not is_drawable(source)
        assert formulas_in(f"$${source}$$") == []
    assert is_drawable(r"\sum_{i=1}^{n} \left( \frac{\sqrt{a}}{b} \right)")
    assert len(formulas_in("$a$ " * 1000)) == 400


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "![",
        "(",
        "*",
        "**a",
        "`",
        "> ",
        "- ",
        "|",
        "<",
        "$",
        "\\(",
        "\\[\n",
        "~",
        "[a](",
        "&#",
        "\\",
    ],
)
def test_repeated_marks_take_no_long_time(text: str) -> None:
    began_s = time.process_time()
    check_harmless(render((text * LONGEST)[:LONGEST]))
    assert time.process_time() - began_s < 10


def test_a_long_text_is_clipped_for_the_eye_and_says_so() -> None:
    turns = (Turn(role="user", text="a" * 50_000), Turn(role="assistant", text="b" * 100_000))
    text = check_harmless(transcript(Conversation(id="a", turns=turns), language="en"))
    assert "20,000 of 50,000 characters are shown" in text
    assert "60,000 of 100,000 characters are shown" in text


def test_many_turns_are_clipped_and_keep_their_numbers() -> None:
    turns = tuple(Turn(role="user", text=f"message {i}") for i in range(300))
    html = transcript(Conversation(id="a", turns=turns), language="en")
    assert "100 earlier messages are not shown" in html
    assert 'id="q-turn-299"' in html
    assert 'id="q-turn-99"' not in html


def test_statistics_are_the_servers_or_say_that_they_are_not() -> None:
    stats = Stats(
        prompt_tokens=1200,
        cached_tokens=1000,
        completion_tokens=21,
        pieces=9,
        first_s=0.5,
        total_s=2.5,
    )
    assert list(stats_words(stats, "en")) == [
        "1,200 tokens read",
        "1,000 of them remembered",
        "21 written",
        "10.0 tokens/s",
        "first after 0.50 s",
    ]
    assert list(stats_words(Stats(pieces=9, first_s=0.5, total_s=2.5), "en"))[:2] == [
        "9 pieces written",
        "4.0 pieces/s",
    ]


def test_arguments_of_calls_are_laid_out_and_others_left_alone() -> None:
    calls = (ToolCall("f", '{"a":[1,"é"]}'), ToolCall("g", "{not json"), ToolCall("h", "[" * 9999))
    html = coming(Turn(role="assistant", text="", calls=calls), language="en")
    text = read(html).text
    assert '"a": [\n    1,\n    "é"\n  ]' in text
    assert "{not json" in text


def test_nothing_yet_is_a_welcome_and_a_sign_of_life() -> None:
    assert "What can I do" in transcript(Conversation(id="a"), language="en")
    assert "正在读取" in coming(Turn(role="assistant", text=""), language="zh")
    assert safe("a\nb") == "a&#10;b"
