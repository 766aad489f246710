"""Between the page's fields and what they mean: reads the conversation and the settings out of
them, and makes the updates that show a conversation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import gradio as gr

from qwenkit.web import conversation as talk
from qwenkit.web.conversation import Conversation
from qwenkit.web.layout import Parts
from qwenkit.web.markdown import safe
from qwenkit.web.stored import from_json, to_json
from qwenkit.web.transcript import transcript
from qwenkit.web.words import known_language, word

Values = Mapping[Any, Any]  # component → what it holds
Updates = dict[Any, Any]  # component → its new value, or `gr.update`
_NAME_CHARACTERS = 80


class View:
    """The fields of one page; `system` is the system prompt of a conversation that begins."""

    def __init__(self, parts: Parts, *, system: str = "") -> None:
        self.parts = parts
        self.system = system

    # What the page holds.

    def language(self, values: Values) -> str:
        """The language that the page speaks."""
        return known_language(values[self.parts.language])

    def conversation(self, values: Values) -> Conversation:
        """The conversation on the page. Raises UsageError for one that is malformed."""
        text = values[self.parts.current]
        return from_json(text) if text else talk.begin(self.system)

    def kept(self, values: Values, language: str) -> dict[str, Any]:
        """What the browser keeps besides conversations."""
        parts = self.parts
        mine = {"language": language, "model": values[parts.model], "system": values[parts.system]}
        return {**mine, **self.settings(values)}

    def settings(self, values: Values) -> dict[str, Any]:
        """The fields of the settings by their names, as they are."""
        return {name: values[component] for name, component in self.parts.settings.items()}

    # What the page shows.

    def signal(self, **told: Any) -> str:
        """Word to the page's script; the number makes equal words differ."""
        quoted = json.dumps({**told, "number": time.time_ns()})
        return f"<div>{safe(quoted)}</div>"

    def held(
        self,
        conversation: Conversation,
        *,
        keep: bool,
        opened: bool = False,
        tell: Mapping[str, Any] | None = None,
    ) -> Updates:
        """The conversation into its field, and word of it to the script, which stores it if it is
        to `keep` it. `opened` says that it has been chosen, and others are no longer wanted.
        """
        text = to_json(conversation)
        current = {
            "id": conversation.id,
            "title": conversation.title,
            "keep": keep,
            "opened": opened,
            "length": len(text.encode("utf-16-le")) // 2,  # as a browser counts
        }
        signal = self.signal(current=current, **(tell or {}))
        return {self.parts.current: text, self.parts.signal: signal}

    def shown(
        self,
        conversation: Conversation,
        language: str,
        *,
        keep: bool = True,
        opened: bool = False,
        is_answering: bool = False,
        tell: Mapping[str, Any] | None = None,
    ) -> Updates:
        """The conversation, with nothing being written."""
        html = transcript(conversation, language=language, is_answering=is_answering)
        held = self.held(conversation, keep=keep, opened=opened, tell=tell)
        return {self.parts.past: html, self.parts.live: "", **held}

    def ready(self, conversation: Conversation, language: str) -> Updates:
        """The box is for a new message again; what is written in it stays."""
        hint = placeholder(conversation, language)
        box = gr.update(placeholder=hint, submit_btn=True, stop_btn=False)
        return {self.parts.message: box, self.parts.editing: "", self.parts.note: ""}

    def emptied(self) -> Updates:
        """Nothing is written in the box."""
        return {self.parts.message: gr.update(value="")}

    def noted(self, words: str) -> Updates:
        """A remark above the box."""
        return {self.parts.note: f"<div>{safe(words)}</div>"}


def placeholder(conversation: Conversation, language: str) -> str:
    """What an empty box asks for."""
    call = talk.pending_call(conversation)
    if call is None:
        return word("placeholder", language)
    return word("placeholder_result", language, name=call.name[:_NAME_CHARACTERS])
