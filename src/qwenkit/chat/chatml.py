"""The built-in ChatML of first-generation chat models, which come without a template.

Every part is encoded by itself, as those models were trained: the role, the line break, the
content. There is always a system turn. Of a long history the newest turns are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwenkit.chat.pieces import (
    ASSISTANT_HEADER,
    TURN_END,
    TURN_START,
    Piece,
    control_piece,
    plain_piece,
)
from qwenkit.errors import RequestError, UsageError
from qwenkit.types.messages import Message
from qwenkit.types.protocols import Tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True, slots=True)
class ChatMLPrompt:
    """The prompt's pieces, and how much of the history was left out of it."""

    pieces: tuple[Piece, ...]
    dropped_messages: int
    dropped_tokens: int


def render_chatml(
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    default_system: str | None = None,
    history_window_tokens: int | None = None,
    add_generation_prompt: bool = True,
) -> ChatMLPrompt:
    """A conversation as ChatML.

    A first message of the system role replaces `default_system`; both may be empty. A turn is a
    user's message and what follows up to the next one. Turns before the last are kept, newest
    first, while the tokens of the system turn and of the kept turns stay below
    `history_window_tokens`; the last turn is always kept and not counted.

    Raises RequestError for tool messages, which this format has no place for, and UsageError for a
    vocabulary without ChatML's tokens.
    """
    _check(messages, tokenizer)
    given_system = messages[:1] if messages and messages[0].role == "system" else ()
    default = DEFAULT_SYSTEM if default_system is None else default_system
    system = _turn_pieces(given_system or (Message("system", default),), tokenizer)
    turns = [_turn_pieces(turn, tokenizer) for turn in _turns(messages[len(given_system) :])]
    kept = _kept_turns(system, turns, history_window_tokens)
    dropped = turns[: len(turns) - kept]
    pieces = [*system, *(piece for turn in turns[len(dropped) :] for piece in turn)]
    if add_generation_prompt:
        pieces += [control_piece(TURN_START, tokenizer), *_header("assistant", tokenizer)]
    return ChatMLPrompt(
        pieces=tuple(pieces),
        dropped_messages=sum(p.text == TURN_START and p.control for t in dropped for p in t),
        dropped_tokens=sum(_count(turn) for turn in dropped),
    )


def strip_contents(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Contents without line breaks in front and white space behind, as the first generation's HTTP
    server sent them to the model (its Python `chat` does not).
    """
    return tuple(replace(m, content=m.content.lstrip("\n").rstrip()) for m in messages)


def _check(messages: Sequence[Message], tokenizer: Tokenizer) -> None:
    missing = [n for n in (TURN_START, TURN_END) if n not in tokenizer.control_tokens]
    if missing:
        raise UsageError(
            f"ChatML needs the control tokens {' and '.join(missing)}, which this vocabulary lacks."
        )
    for i, message in enumerate(messages):
        if message.role == "tool" or message.tool_calls:
            raise RequestError(
                f"messages[{i}]",
                "this model's built-in ChatML has no tool messages. Put the result into a user "
                "message, or use a model whose chat template knows tools.",
            )


def _turns(messages: Sequence[Message]) -> list[list[Message]]:
    turns: list[list[Message]] = []
    for message in messages:
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns


def _kept_turns(
    system: Sequence[Piece], turns: Sequence[Sequence[Piece]], window_tokens: int | None
) -> int:
    """How many turns, counted from the last, stay in the prompt."""
    if window_tokens is None:
        return len(turns)
    total = _count(system)
    for kept, turn in enumerate(reversed(turns[:-1]), start=1):
        total += _count(turn)
        if total >= window_tokens:
            return kept
    return len(turns)


def _count(pieces: Sequence[Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def _turn_pieces(messages: Sequence[Message], tokenizer: Tokenizer) -> list[Piece]:
    pieces: list[Piece] = []
    for message in messages:
        pieces.append(control_piece(TURN_START, tokenizer))
        pieces += _header(message.role, tokenizer)
        pieces.append(plain_piece(message.content, tokenizer))
        pieces.append(control_piece(TURN_END, tokenizer))
        pieces.append(plain_piece("\n", tokenizer))
    return pieces


def _header(role: str, tokenizer: Tokenizer) -> list[Piece]:
    ids = (*tokenizer.encode(role), *tokenizer.encode("\n"))
    header_bytes = len(ASSISTANT_HEADER) if role == "assistant" else 0
    return [Piece(f"{role}\n", ids, header_bytes=header_bytes)]
