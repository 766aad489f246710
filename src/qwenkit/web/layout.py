"""The page's components and where they stand; what they do is in `actions`.

Nothing here runs a script of Gradio's own kind (`js=`, `gr.HTML`): those are compiled by the
browser from text, which the page's Content-Security-Policy forbids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from qwenkit.web.markdown import DISPLAY_MATH, INLINE_MATH, safe
from qwenkit.web.request import SETTINGS, Setting
from qwenkit.web.words import word

_LATEX = [
    {"left": INLINE_MATH[0], "right": INLINE_MATH[1], "display": False},
    {"left": DISPLAY_MATH[0], "right": DISPLAY_MATH[1], "display": True},
]
# BrowserState encrypts what it keeps; a key that changed with each start would lose it.
_KEPT_UNDER = "qwenkit-settings"
_FIRST_SETTINGS = ("temperature", "top_p", "max_tokens", "seed")


@dataclass(slots=True)
class Parts:
    """Every component that an action reads or writes."""

    past: Any = None  # the turns that are complete
    live: Any = None  # the reply that is being written
    message: Any = None
    note: Any = None
    model: Any = None
    system: Any = None
    settings: dict[str, Any] = field(default_factory=dict)  # by the names of `request.SETTINGS`
    current: Any = None  # the conversation as JSON: the page's truth
    sent: Any = None  # the script's number of what is being sent
    editing: Any = None  # the number of the turn that is being changed, or ""
    language: Any = None
    action: Any = None  # what the page's script asks for, as JSON
    signal: Any = None  # what the page's script is told, as JSON
    exported: Any = None
    kept: Any = None  # the settings, in the browser's storage
    words: dict[Any, str] = field(default_factory=dict)  # component → the word that labels it

    def inputs(self) -> set[Any]:
        """What an action may read."""
        named = {self.message, self.model, self.system, self.current, self.editing}
        named.add(self.sent)
        return {*named, self.language, self.action, *self.settings.values()}

    def outputs(self) -> list[Any]:
        """What an action may write."""
        shown = [self.past, self.live, self.message, self.note, self.model, self.system]
        hidden = [self.current, self.editing, self.language, self.signal, self.exported]
        return [*shown, *hidden, *self.settings.values(), self.kept, *self.titles()]

    def titles(self) -> list[Any]:
        """The headings, which change with the language only."""
        return [part for part in self.words if isinstance(part, gr.Markdown)]


def build() -> tuple[gr.Blocks, Parts]:
    """The page without behaviour, and its parts."""
    parts = Parts()
    with gr.Blocks(analytics_enabled=False, title="qwenkit", fill_width=True) as page:
        with gr.Row(elem_id="q-shell", equal_height=False):
            with gr.Column(elem_id="q-nav", min_width=0, scale=0):
                gr.Markdown(_NAV)
            with gr.Column(elem_id="q-main", min_width=0):
                _main(parts)
            with gr.Column(elem_id="q-side", min_width=0, scale=0):
                _side(parts)
        _hidden(parts)
    return page, parts


_NAV = (
    '<div class="q-nav-head"><span class="q-brand">qwenkit</span>'
    '<button type="button" class="q-do q-toggle-nav q-icon"></button></div>'
    '<button type="button" class="q-do q-new"></button>'
    '<div class="q-list" id="q-list"></div>'
    '<div class="q-nav-foot"><button type="button" class="q-do q-import"></button>'
    '<button type="button" class="q-do q-export"></button>'
    '<button type="button" class="q-do q-export-json"></button></div>'
)
_HEAD_LEFT = (
    '<button type="button" class="q-do q-toggle-nav q-icon"></button>'
    '<button type="button" class="q-do q-new q-icon"></button>'
)
_HEAD_RIGHT = (
    '<button type="button" class="q-do q-reload-models q-icon"></button>'
    '<button type="button" class="q-do q-export q-icon"></button>'
    '<button type="button" class="q-do q-language q-icon">中文</button>'
    '<button type="button" class="q-do q-dark q-icon"></button>'
    '<button type="button" class="q-do q-toggle-side q-icon"></button>'
)


def _main(parts: Parts) -> None:
    with gr.Row(elem_id="q-head"):
        gr.Markdown(_HEAD_LEFT, elem_id="q-head-left", elem_classes="q-bar")
        parts.model = gr.Dropdown(
            choices=[],
            value=None,
            allow_custom_value=True,
            container=False,
            show_label=False,
            label=word("model", "en"),
            elem_id="q-model",
            min_width=0,
        )
        gr.Markdown(_HEAD_RIGHT, elem_id="q-head-right", elem_classes="q-bar")
    with gr.Column(elem_id="q-scroll"):
        parts.past = gr.Markdown(latex_delimiters=_LATEX, elem_id="q-past")
        parts.live = gr.Markdown(latex_delimiters=_LATEX, elem_id="q-live")
    with gr.Column(elem_id="q-foot"):
        parts.note = gr.Markdown(elem_id="q-note")
        parts.message = gr.Textbox(
            lines=1,
            max_lines=12,
            show_label=False,
            label=word("placeholder", "en"),
            container=False,
            autofocus=True,
            placeholder=word("placeholder", "en"),
            submit_btn=True,
            stop_btn=False,
            elem_id="q-message",
        )


def _side(parts: Parts) -> None:
    gr.Markdown('<button type="button" class="q-do q-close q-icon"></button>')
    parts.words[gr.Markdown(_heading("settings", "en"))] = "settings"
    parts.system = _text("system_prompt", lines=4, hint="system_hint")
    parts.words[parts.system] = "system_prompt"
    parts.words[gr.Markdown(_heading("sampling", "en"))] = "sampling"
    first = [s for s in SETTINGS if s.name in _FIRST_SETTINGS]
    for setting in [*first, *(s for s in SETTINGS if s.name not in _FIRST_SETTINGS)]:
        _keep(parts, setting.name, _number(setting))
    _keep(parts, "stop", _text("stop", lines=2))
    _keep(parts, "tools", _text("tools", lines=4))


def _keep(parts: Parts, name: str, component: Any) -> None:
    parts.settings[name] = component
    parts.words[component] = name


def _text(name: str, *, lines: int, hint: str = "") -> Any:
    return gr.Textbox(
        label=word(name, "en"),
        lines=lines,
        max_lines=12,
        placeholder=word(hint, "en") if hint else None,
        elem_id=f"q-set-{name}",
    )


def _number(setting: Setting) -> Any:
    """Without bounds of Gradio's: it would refuse every action, without saying why."""
    return gr.Number(
        value=None,
        label=word(setting.name, "en"),
        step=1 if setting.is_whole else 0.05,
        min_width=0,
        elem_id=f"q-set-{setting.name}",
        elem_classes="q-number",
    )


def _heading(name: str, language: str) -> str:
    hint = f"<p>{safe(word('sampling_hint', language))}</p>" if name == "sampling" else ""
    return f'<div class="q-heading"><h3>{safe(word(name, language))}</h3>{hint}</div>'


def _hidden(parts: Parts) -> None:
    def text(name: str) -> Any:
        return gr.Textbox(visible="hidden", elem_id=f"q-{name}", max_lines=1)

    parts.current, parts.editing = text("current"), text("editing")
    parts.sent = text("sent")
    parts.language, parts.action, parts.exported = text("lang"), text("action"), text("exported")
    parts.signal = gr.Markdown(visible="hidden", elem_id="q-signal")
    parts.kept = gr.BrowserState({}, storage_key=_KEPT_UNDER, secret=_KEPT_UNDER)


def labels(parts: Parts, language: str) -> dict[Any, Any]:
    """The updates that make every component speak `language`."""
    updates: dict[Any, Any] = {}
    for component, name in parts.words.items():
        if isinstance(component, gr.Markdown):
            updates[component] = _heading(name, language)
        else:
            updates[component] = gr.update(label=word(name, language))
    hint = word("system_hint", language)
    updates[parts.system] = gr.update(label=word("system_prompt", language), placeholder=hint)
    return updates


def merged(updates: Iterable[dict[Any, Any]]) -> dict[Any, Any]:
    """Several sets of updates as one: of a component that is in two, the properties of both."""
    result: dict[Any, Any] = {}
    for some in updates:
        for component, update in some.items():
            before = result.get(component)
            both = isinstance(before, dict) and isinstance(update, dict)
            result[component] = {**(before or {}), **update} if both else update
    return result
