r"""Formulas in Markdown: `$a$`, `$$a$$`, `\(a\)`, `\[a\]` and `\begin{align}…` as tokens.

A lone dollar is money: `$` opens a formula only before, and closes one only after, something that
is no space, and not before a digit (the rule of pandoc's tex_math_dollars).
"""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from markdown_it.ruler import RuleOptionsType
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

_ENVIRONMENTS = (
    "align|aligned|alignat|array|bmatrix|Bmatrix|cases|CD|darray|dcases|equation|gather|gathered|"
    "matrix|pmatrix|rcases|smallmatrix|split|vmatrix|Vmatrix"
)
_DOLLAR = re.compile(r"\$(?=[^\s$])((?:\\.|[^\\$])*?)(?<=\S)\$(?!\d)", re.DOTALL)
_INLINE = (
    (r"\(", r"\)", re.compile(r"\\\((.+?)\\\)", re.DOTALL), False),
    (r"\[", r"\]", re.compile(r"\\\[(.+?)\\\]", re.DOTALL), True),
    ("$$", "$$", re.compile(r"\$\$(?!\$)(.+?)\$\$", re.DOTALL), True),
)
_BLOCK = (
    ("$$", "$$", re.compile(r"\$\$(.+?)\$\$[ \t]*(?=\n|\Z)", re.DOTALL)),
    (r"\[", r"\]", re.compile(r"\\\[(.+?)\\\][ \t]*(?=\n|\Z)", re.DOTALL)),
    (
        r"\begin{",
        r"\end{",
        re.compile(rf"(\\begin{{({_ENVIRONMENTS})(\*?)}}.+?\\end{{\2\3}})[ \t]*(?=\n|\Z)", re.S),
    ),
)
_LONGEST = 8000  # characters looked at for the end of a formula


def formulas(parser: MarkdownIt) -> None:
    """Teach `parser` the tokens "math" and "math_display", whose content is the formula's source.

    Register it with `parser.use(formulas)`.
    """
    parser.inline.ruler.before("escape", "formula", _inline)
    options: RuleOptionsType = {"alt": ["paragraph", "reference", "blockquote", "list"]}
    parser.block.ruler.before("fence", "formula", _block, options)


def _inline(state: StateInline, silent: bool) -> bool:
    if state.src[state.pos] not in "\\$":
        return False
    window = state.src[state.pos : min(state.posMax, state.pos + _LONGEST)]
    kind = next((k for k in _INLINE if window.startswith(k[0])), None)
    if kind is None:
        match, is_display = _DOLLAR.match(window), False
    else:
        _, closing, pattern, is_display = kind
        match = pattern.match(window) if closing in window[2:] else None
    if match is None or not match[1].strip() or "\n\n" in match[1]:
        return False
    if not silent:
        token = state.push("math_display" if is_display else "math", "", 0)
        token.content = match[1].strip()
    state.pos += match.end()
    return True


def _block(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    if state.is_code_block(start_line):
        return False
    start = state.bMarks[start_line] + state.tShift[start_line]
    window = state.src[start : min(state.eMarks[end_line - 1], start + _LONGEST)]
    match = None
    for opening, closing, pattern in _BLOCK:
        if window.startswith(opening) and closing in window[2:]:
            match = pattern.match(window)
    if match is None or not match[1].strip() or re.search(r"\n[ \t]*\n", match[1]):
        return False
    if silent:
        return True
    lines = match[0].count("\n") + 1
    token = state.push("math_display", "", 0)
    token.content = match[1].strip()
    token.block = True
    token.map = [start_line, start_line + lines]
    state.line = start_line + lines
    return True
