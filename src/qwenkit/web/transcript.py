"""A conversation → the HTML that the page shows: one line, and nothing in it can act.

Every piece of text passes through `markdown.render`, `markdown.plain` or `markdown.safe`. What is
long is clipped for the eye, always with a line that says so; the conversation itself is whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from qwenkit.types.messages import ToolCall
from qwenkit.web.conversation import Conversation, Stats, Turn, is_void, pending_call
from qwenkit.web.markdown import LONGEST, plain, render, safe
from qwenkit.web.words import word

_PLAIN_SHOWN = 20_000  # characters shown of what is not Markdown
_NAME_SHOWN = 80
_RUN = re.compile(r"[!-~]{400}")  # a word that is none; the page's style sheet says why
_TURNS_SHOWN = 200


def transcript(conversation: Conversation, *, language: str, is_answering: bool = False) -> str:
    """All turns, or a welcome where there is none yet."""
    turns = conversation.turns
    if not turns and not is_answering:
        return _welcome(language)
    first = max(0, len(turns) - _TURNS_SHOWN)
    earlier = _note(safe(word("earlier", language, count=first))) if first else ""
    shown = "".join(
        _turn(turn, first + i, conversation, language, is_answering)
        for i, turn in enumerate(turns[first:])
    )
    wanted = pending_call(conversation)
    if wanted is not None and not is_answering:
        name = _short(wanted.name, _NAME_SHOWN)
        shown += _note(safe(word("result_wanted", language, name=name)), kind="q-wanted")
    return f'<div class="q-turns">{earlier}{shown}</div>'


def coming(turn: Turn, *, language: str) -> str:
    """The reply that is being written."""
    body = _assistant_body(turn, language)
    if not body:
        body = f'<p class="q-waiting">{safe(word("waiting", language))}<i></i><i></i><i></i></p>'
    return f'<div class="q-turns"><div class="q-turn q-assistant q-coming">{body}</div></div>'


def _welcome(language: str) -> str:
    return (
        f'<div class="q-welcome"><h2>{safe(word("welcome", language))}</h2>'
        f"<p>{safe(word('welcome_hint', language))}</p>"
        f"<p>{safe(word('kept_here', language))}</p></div>"
    )


def _turn(
    turn: Turn, index: int, conversation: Conversation, language: str, is_answering: bool
) -> str:
    if turn.role == "assistant":
        body = _assistant_body(turn, language) + _ending(turn, language)
    elif turn.role == "user":
        body = f'<div class="q-bubble">{_clipped(turn.text, language)}</div>'
    else:
        body = _tool_result(turn, conversation, language)
    buttons = "" if is_answering else _buttons(turn, index, conversation, language)
    return f'<div class="q-turn q-{turn.role}" id="q-turn-{index}">{body}{buttons}</div>'


def _assistant_body(turn: Turn, language: str) -> str:
    thoughts = ""
    if turn.reasoning:
        is_open = "" if turn.text else " open"
        summary = f"<summary>{safe(word('thinking', language))}</summary>"
        text = _clipped(turn.reasoning, language)
        thoughts = f'<details class="q-thoughts"{is_open}>{summary}{text}</details>'
    said = ""
    if turn.text:
        kind = "q-said q-run" if _RUN.search(turn.text[:LONGEST]) else "q-said"
        said = f'<div class="{kind}">{render(turn.text, copy=word("copy", language))}</div>'
        if len(turn.text) > LONGEST:
            said += _clip_note(LONGEST, len(turn.text), language)
    return thoughts + said + "".join(_call(call, language) for call in turn.calls)


def _call(call: ToolCall, language: str) -> str:
    name = safe(_short(call.name, _NAME_SHOWN))
    arguments = _clipped(_pretty(call.arguments), language)
    summary = f"<summary>{safe(word('call', language))} <bdi><code>{name}</code></bdi></summary>"
    return f'<details class="q-call" open>{summary}{arguments}</details>'


def _pretty(arguments: str) -> str:
    """Arguments that are JSON are laid out for reading; others stay as they are."""
    if len(arguments) > _PLAIN_SHOWN:
        return arguments
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False, indent=2)
    except (ValueError, RecursionError):
        return arguments


def _tool_result(turn: Turn, conversation: Conversation, language: str) -> str:
    calls = [call for said in conversation.turns for call in said.calls]
    name = next((call.name for call in reversed(calls) if call.id == turn.call_id), "")
    shown_name = safe(_short(name, _NAME_SHOWN))
    title = f"{safe(word('result', language))} <bdi><code>{shown_name}</code></bdi>"
    text = _clipped(turn.text, language)
    return f'<details class="q-call q-result" open><summary>{title}</summary>{text}</details>'


def _ending(turn: Turn, language: str) -> str:
    """Why it ended, if not by itself, and what it took."""
    notes = ""
    if turn.ended == "error":
        notes = f'<div class="q-error">{_clipped(turn.error, language)}</div>'
    elif turn.ended in ("stopped", "length", "edited"):
        notes = _note(safe(word(turn.ended, language)))
    elif turn.ended == "content_filter":
        notes = _note(safe(word("filtered", language)))
    if turn.stats is None or turn.ended == "error":
        return notes
    return (
        notes + f'<p class="q-stats">{" · ".join(map(safe, stats_words(turn.stats, language)))}</p>'
    )


def stats_words(stats: Stats, language: str) -> Iterator[str]:
    """What a reply took: tokens as the server counts them, or pieces where it does not."""
    if stats.prompt_tokens is not None:
        yield word("tokens_in", language, count=f"{stats.prompt_tokens:,.0f}")
    if stats.cached_tokens:
        yield word("tokens_cached", language, count=f"{stats.cached_tokens:,.0f}")
    counted = stats.completion_tokens is not None
    count = stats.completion_tokens if stats.completion_tokens is not None else stats.pieces
    yield word("tokens_out" if counted else "pieces_out", language, count=f"{count:,.0f}")
    if stats.tokens_per_second is not None:
        speed = f"{stats.tokens_per_second:.1f}"
        yield word("speed" if counted else "pieces_speed", language, speed=speed)
    if stats.first_s is not None:
        yield word("first", language, seconds=f"{stats.first_s:.2f}")


def _buttons(turn: Turn, index: int, conversation: Conversation, language: str) -> str:
    names = [] if turn.role == "assistant" and is_void(turn) else ["copy", "edit"]
    last = len(conversation.turns) - 1
    if turn.role == "assistant" and index == last:
        names.append("regenerate")
    if turn.role == "user" and not any(t.role == "user" for t in conversation.turns[index + 1 :]):
        names += ["undo"] if index < last else ["undo", "regenerate"]
    buttons = "".join(
        f'<button type="button" class="q-do q-{name}" title="{title}"></button>'
        for name, title in ((name, safe(word(name, language))) for name in names)
    )
    return f'<div class="q-buttons">{buttons}</div>'


def _clipped(text: str, language: str) -> str:
    if len(text) <= _PLAIN_SHOWN:
        return plain(text)
    return plain(text[:_PLAIN_SHOWN]) + _clip_note(_PLAIN_SHOWN, len(text), language)


def _clip_note(shown: int, whole: int, language: str) -> str:
    return _note(safe(word("clipped", language, shown=f"{shown:,}", all=f"{whole:,}")))


def _note(words: str, *, kind: str = "") -> str:
    return f'<p class="q-note {kind}">{words}</p>'


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
