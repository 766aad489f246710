"""Markdown that a model wrote → HTML that cannot do anything.

The HTML holds only tags and attributes written here: HTML in the text is shown as text, an image
is a link to it, and a link leads to http, https or mail addresses only. So nothing runs and nothing
is loaded, whatever the text says. It is one line without raw newlines or tabs, which is what keeps
Gradio's own Markdown component from reading it as Markdown a second time.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from qwenkit.web.formulas import formulas
from qwenkit.web.stored import whole

# Around a formula, for Gradio's KaTeX; private characters, so that no text can begin one.
INLINE_MATH = ("\uefe0", "\uefe1")
DISPLAY_MATH = ("\uefe2", "\uefe3")
_RESERVED = {ord(c): "\ufffd" for c in (*INLINE_MATH, *DISPLAY_MATH, "\0")}

LONGEST = 60_000  # characters of one text that are shown as Markdown
_FORMULAS = 400  # drawn in one text; a browser takes about a millisecond for each
_FORMULA_CHARACTERS = 3000
_FORMULA_DEPTH = 60
_HIGHLIGHTED = 20_000  # characters of one block of code
_ESCAPES = {ord("\n"): "&#10;", ord("\t"): "&#9;", ord("%"): "&#37;", ord("\r"): ""}
_COMMANDS_IN_A_ROW = re.compile(r"(?:\\[a-zA-Z]+\s*){50}|[\^_'\\]{200}")
_LINKS = ("http", "https", "mailto")
_LANGUAGES = frozenset(
    re.findall(
        r"\S+",
        """
bash c c++ cpp c# cs csharp css cuda diff docker dockerfile go haskell html ini java javascript js
json jsx julia kotlin latex lua makefile markdown md matlab perl php powershell py python pycon r
ruby rust rs scala sh shell sql swift tex toml ts tsx typescript vim xml yaml yml zsh
""",
    )
)


def safe(text: str) -> str:
    """`text` as HTML text on one line, every character of it shown as it is."""
    return html.escape(whole(text).translate(_RESERVED)).translate(_ESCAPES)


def render(text: str, *, copy: str = "Copy") -> str:
    """The Markdown `text` as one line of harmless HTML; `copy` is on the buttons of code.

    Of a text longer than `LONGEST` characters that much is shown, as it is; see `clip`.
    """
    if len(text) > LONGEST:
        return plain(text[:LONGEST])
    try:
        found: str = _parser().render(
            whole(text).translate(_RESERVED), {"copy": copy, "formulas": 0}
        )
    except RecursionError:
        return plain(text)
    return found.replace("\n", "")


def plain(text: str) -> str:
    """`text` exactly as it is, spaces and newlines kept."""
    return f'<pre class="q-plain">{safe(text)}</pre>'


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}, renderer_cls=_Renderer)
    parser.enable(["table", "strikethrough"]).use(formulas)
    parser.validateLink = is_link  # type: ignore[method-assign]
    return parser


def is_link(url: str) -> bool:
    """A link may lead there: an address of the web or of mail, with nothing that hides in it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme.lower() in _LINKS and not re.search(r"[\x00-\x20\x7f]", url)


class _Renderer(RendererHTML):
    """The tokens whose HTML differs from CommonMark's own; all else is `RendererHTML`'s."""

    def text(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return safe(tokens[idx].content)

    def code_inline(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return f"<code>{safe(tokens[idx].content)}</code>"

    def code_block(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return code(tokens[idx].content, "", copy=env["copy"])

    def fence(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return code(tokens[idx].content, tokens[idx].info, copy=env["copy"])

    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        alt, url = tokens[idx].content, str(tokens[idx].attrs.get("src", ""))
        link = f'<a href="{html.escape(url)}" title="{html.escape(url)}">{safe(alt or url)}</a>'
        return f'<span class="q-image">{link}</span>'

    def link_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        url = html.escape(str(tokens[idx].attrs.get("href", "")))
        return f'<a href="{url}" title="{url}">'

    def math(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return _formula(tokens[idx].content, INLINE_MATH, env)

    def math_display(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return f'<span class="q-display">{_formula(tokens[idx].content, DISPLAY_MATH, env)}</span>'


def _formula(source: str, around: tuple[str, str], env: dict[str, Any]) -> str:
    """For KaTeX to draw, unless it would take a browser long: then its source."""
    env["formulas"] += 1
    if env["formulas"] > _FORMULAS or not is_drawable(source):
        return f"<code>{safe(source)}</code>"
    return f'<span class="q-math">{around[0]}{safe(source)}{around[1]}</span>'


def is_drawable(source: str) -> bool:
    """A formula short and flat enough: KaTeX is recursive, and its stack is the browser's."""
    if len(source) > _FORMULA_CHARACTERS or _COMMANDS_IN_A_ROW.search(source):
        return False
    depth = deepest = 0
    for mark in re.findall(r"\\[{}]|[{}]|\\left\b|\\right\b|\\begin\b|\\end\b", source):
        depth += {"{": 1, "\\left": 1, "\\begin": 1, "}": -1, "\\right": -1, "\\end": -1}.get(
            mark, 0
        )
        deepest = max(deepest, depth)
    return deepest <= _FORMULA_DEPTH


def code(text: str, info: str, *, copy: str) -> str:
    """A block of code with its language and a button that copies it; coloured if it is short."""
    language = info.split()[0][:24] if info.split() else ""
    colours = _coloured(text, language.lower()) if len(text) <= _HIGHLIGHTED else None
    return (
        f'<div class="q-code"><div class="q-code-bar"><span>{safe(language)}</span>'
        f'<button type="button" class="q-do q-copy-code">{safe(copy)}</button></div>'
        f'<pre dir="ltr"><code>{safe(text) if colours is None else colours}</code></pre></div>'
    )


@lru_cache(maxsize=256)
def _coloured(text: str, language: str) -> str | None:
    """The code in spans of Pygments' classes; None for a language that is not coloured here."""
    if language not in _LANGUAGES:
        return None
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None
    coloured: str = highlight(text, lexer, HtmlFormatter(nowrap=True))
    return coloured.translate(_ESCAPES)
