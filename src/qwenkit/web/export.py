"""A conversation as a file: Markdown to read, JSON to bring back."""

from __future__ import annotations

import re

from qwenkit.web.conversation import Conversation, Turn
from qwenkit.web.stored import to_json
from qwenkit.web.transcript import stats_words
from qwenkit.web.words import word

KINDS = {"markdown": ("md", "text/markdown"), "json": ("json", "application/json")}
_NAME_CHARACTERS = 60


def export(conversation: Conversation, kind: str, *, language: str) -> tuple[str, str, str]:
    """(the file's name, its media type, its text) of a kind in `KINDS`. Raises KeyError."""
    suffix, media_type = KINDS[kind]
    text = to_json(conversation, indent=2) if kind == "json" else markdown(conversation, language)
    return f"{file_name(conversation.title)}.{suffix}", media_type, text


def file_name(title: str) -> str:
    """A title as the name of a file on any system: letters, digits, and dashes between them."""
    name = "-".join(re.findall(r"\w+", title))[:_NAME_CHARACTERS].strip("-_")
    return name or "conversation"


def markdown(conversation: Conversation, language: str) -> str:
    """The conversation as Markdown; what was said is kept to the letter."""
    parts = [f"# {conversation.title or word('untitled', language)}"]
    if conversation.system:
        parts += [f"## {word('system', language)}", fenced(conversation.system)]
    for turn in conversation.turns:
        parts += _turn(turn, language)
    return "\n\n".join(parts) + "\n"


def _turn(turn: Turn, language: str) -> list[str]:
    if turn.role == "user":
        return [f"## {word('you', language)}", turn.text]
    if turn.role == "tool":
        return [f"## {word('result', language)} {turn.call_id or ''}".rstrip(), fenced(turn.text)]
    name = f"## {word('assistant', language)}" + (f" ({turn.model})" if turn.model else "")
    parts = [name]
    if turn.reasoning:
        parts += [f"### {word('thinking', language)}", fenced(turn.reasoning)]
    if turn.text:
        parts.append(turn.text)
    for call in turn.calls:
        parts += [f"### {word('call', language)} {call.name} ({call.id})", fenced(call.arguments)]
    if turn.error:
        parts.append(fenced(turn.error))
    elif turn.stats is not None:
        parts.append(f"*{' · '.join(stats_words(turn.stats, language))}*")
    return parts


def fenced(text: str) -> str:
    """`text` as a block of code, its fence longer than any inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
