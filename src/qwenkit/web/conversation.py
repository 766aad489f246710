"""A conversation as plain data: what was said, raw, and every edit of it as a function.

What the page shows is made from this and never read back, so the server gets exactly what was
typed and what it answered. The browser keeps it as the JSON of `to_json`.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Literal

from qwenkit.errors import UsageError
from qwenkit.types.messages import ToolCall

Said = Literal["user", "assistant", "tool"]
_TITLE_CHARACTERS = 48
_SHORTEST_S = 0.02  # in less, a speed says only how the network packs things


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What a reply took. `prompt_tokens`, `cached_tokens` and `completion_tokens` are the server's
    own counts; None where it gives none. `pieces` came one by one, the first after `first_s`, the
    last after `total_s` seconds.
    """

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    pieces: int = 0
    first_s: float | None = None
    total_s: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second after the first one; None where there is too little to tell."""
        tokens = self.completion_tokens if self.completion_tokens is not None else self.pieces
        if self.first_s is None or tokens < 2 or self.total_s - self.first_s < _SHORTEST_S:
            return None
        return (tokens - 1) / (self.total_s - self.first_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn, exactly as it was typed or received.

    `ended` says why an assistant's turn ended: the server's finish reason, "stopped" by the user,
    or "error" with the words in `error`. `call_id` is the call that a tool's turn answers.
    """

    role: Said
    text: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_id: str | None = None
    model: str = ""
    ended: str = ""
    error: str = ""
    stats: Stats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """`revision` grows with every change, so that a reader can tell an old copy from a new one."""

    id: str
    title: str = ""
    system: str = ""
    turns: tuple[Turn, ...] = ()
    revision: int = 0


def begin(system: str = "") -> Conversation:
    """An empty conversation under a name that nobody can guess."""
    return Conversation(id=secrets.token_hex(12), system=system)


def pending_call(conversation: Conversation) -> ToolCall | None:
    """The first call of the last reply that no tool's turn has answered yet."""
    answered = set()
    for turn in reversed(conversation.turns):
        if turn.role == "tool":
            answered.add(turn.call_id)
        else:
            calls = turn.calls if turn.role == "assistant" else ()
            return next((call for call in calls if call.id not in answered), None)
    return None


def say(conversation: Conversation, text: str) -> Conversation:
    """With `text` said by the user: a new message, or the result of the call that waits for one.

    A reply that failed before it said anything is dropped. Raises UsageError for no text.
    """
    call = pending_call(conversation)
    if not text.strip() and call is None:
        raise UsageError("The message is empty.")
    turns = conversation.turns
    if turns and turns[-1].role == "assistant" and is_void(turns[-1]):
        turns = turns[:-1]
    if call is not None:
        turn = Turn(role="tool", text=text, call_id=call.id)
    else:
        turn = Turn(role="user", text=text)
    title = conversation.title or title_of(text)
    return _changed(conversation, (*turns, turn), title=title)


def is_void(turn: Turn) -> bool:
    """Nothing was said: no text, no call."""
    return not turn.text and not turn.calls


def title_of(text: str) -> str:
    """The first line that says something, shortened."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= _TITLE_CHARACTERS else line[: _TITLE_CHARACTERS - 1].rstrip() + "…"


def with_turn(conversation: Conversation, turn: Turn) -> Conversation:
    """With one more turn."""
    return _changed(conversation, (*conversation.turns, turn))


def edit(conversation: Conversation, index: int, text: str) -> tuple[Conversation, bool]:
    """(the conversation with turn `index` reading `text`, whether it must be answered anew).

    What the user said is answered anew, so all that came after it goes; a reply that is corrected
    stays in place. Raises UsageError for a turn that is not there, or for no text.
    """
    turn = turn_at(conversation, index)
    if not text.strip() and turn.role == "user":
        raise UsageError("The message is empty.")
    if turn.role == "assistant":
        new = replace(turn, text=text, ended="edited", error="", stats=None)
        turns = (*conversation.turns[:index], new, *conversation.turns[index + 1 :])
        return _changed(conversation, turns), False
    title = conversation.title
    if not title or title == title_of(turn.text):
        title = title_of(text)
    turns = (*conversation.turns[:index], replace(turn, text=text))
    return _changed(conversation, turns, title=title), True


def turn_at(conversation: Conversation, index: int) -> Turn:
    """Raises UsageError for a turn that is not there."""
    if not 0 <= index < len(conversation.turns):
        raise UsageError(
            f"There is no message {index + 1}; the conversation has {len(conversation.turns)}."
        )
    return conversation.turns[index]


def without_reply(conversation: Conversation) -> Conversation:
    """Without the last reply, ready to be answered again. Raises UsageError if nothing was said."""
    turns = conversation.turns
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if not turns:
        raise UsageError("There is nothing to answer yet.")
    return _changed(conversation, turns)


def undo(conversation: Conversation) -> tuple[Conversation, str]:
    """(without the user's last message and all after it, that message's text).

    Raises UsageError if the user said nothing.
    """
    said = [i for i, turn in enumerate(conversation.turns) if turn.role == "user"]
    if not said:
        raise UsageError("There is nothing to take back.")
    text = conversation.turns[said[-1]].text
    return _changed(conversation, conversation.turns[: said[-1]]), text


def rename(conversation: Conversation, title: str) -> Conversation:
    """Under another title, on one line."""
    return replace(conversation, title=title_of(title), revision=conversation.revision + 1)


def _changed(
    conversation: Conversation, turns: tuple[Turn, ...], *, title: str | None = None
) -> Conversation:
    return replace(
        conversation,
        turns=turns,
        title=conversation.title if title is None else title,
        revision=conversation.revision + 1,
    )
