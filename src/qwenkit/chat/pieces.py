"""A prompt in pieces: control tokens and the runs of plain text between them.

Plain runs are encoded without control tokens, control tokens are taken by their id, so the ids of
a prompt never depend on what a text looks like. Also finds, in those pieces, what an assistant
said. Must not know where the pieces come from.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from qwenkit.chat.guard import Guard
from qwenkit.types.protocols import Tokenizer

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
ASSISTANT_HEADER = "assistant\n"


@dataclass(frozen=True, slots=True)
class Piece:
    """One control token, or a run of plain text.

    `header_bytes` is above 0 where the program itself wrote the first line of an assistant's turn.
    """

    text: str
    ids: tuple[int, ...]
    control: bool = False
    header_bytes: int = 0


def control_piece(name: str, tokenizer: Tokenizer) -> Piece:
    """The piece of one control token. Raises KeyError for a name the vocabulary lacks."""
    return Piece(name, (tokenizer.control_tokens[name],), control=True)


def plain_piece(text: str, tokenizer: Tokenizer, *, header_bytes: int = 0) -> Piece:
    """The piece of a run of text in which nothing is a control token."""
    return Piece(text, tuple(tokenizer.encode(text)), header_bytes=header_bytes)


def split_marked(marked: str, guard: Guard, tokenizer: Tokenizer) -> Iterator[Piece]:
    """Marked text (see `guard`) in pieces: a control token is where unmarked characters spell it,
    the longest name first.
    """
    position = 0
    for match in _names_pattern(tuple(tokenizer.control_tokens)).finditer(marked):
        if match.start() > position:
            yield _run(marked[position : match.start()], guard, tokenizer)
        yield control_piece(match[0], tokenizer)
        position = match.end()
    if position < len(marked):
        yield _run(marked[position:], guard, tokenizer)


def _run(marked: str, guard: Guard, tokenizer: Tokenizer) -> Piece:
    ours = marked.startswith(ASSISTANT_HEADER)  # unmarked: a content cannot claim it either
    header_bytes = len(ASSISTANT_HEADER) if ours else 0
    return plain_piece(guard.plain(marked), tokenizer, header_bytes=header_bytes)


@lru_cache(maxsize=16)
def _names_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def cut_before_turn_end(
    pieces: Sequence[Piece], end_ids: Collection[int | None]
) -> list[Piece] | None:
    """The pieces before the token that ends the last turn; all of them where the last turn is
    still open; None where no turn has an end.
    """
    for i in range(len(pieces) - 1, -1, -1):
        piece = pieces[i]
        if piece.control and piece.ids[0] in end_ids:
            return list(pieces[:i])
        if piece.control and piece.text == TURN_START:
            return list(pieces)
    return None


def loss_mask(
    pieces: Sequence[Piece], tokenizer: Tokenizer, *, open_turn: bool
) -> tuple[int, ...] | None:
    """1 for every id an assistant said, the end of its turn included; 0 for all others.

    A last turn without an end counts only with `open_turn` (otherwise it is the prompt for the
    next answer). None when the vocabulary has no ChatML tokens to tell turns apart.
    """
    if not {TURN_START, TURN_END} <= set(tokenizer.control_tokens):
        return None
    mask: list[int] = []
    opened_at: int | None = None
    control = ""  # the control token just passed, if the last piece was one
    for piece in pieces:
        header = 0
        if piece.control and piece.text == TURN_START:
            opened_at = None
        elif control == TURN_START and piece.header_bytes:
            header = _header_ids(piece, tokenizer)
            opened_at = len(mask) + header
        mask += [0] * header + [int(opened_at is not None)] * (len(piece.ids) - header)
        control = piece.text if piece.control else ""
        if control == TURN_END:
            opened_at = None
    if opened_at is not None and not open_turn:
        mask[opened_at:] = [0] * (len(mask) - opened_at)
    return tuple(mask)


def _header_ids(piece: Piece, tokenizer: Tokenizer) -> int:
    """How many of the first ids hold a byte of the header."""
    size_bytes = 0
    for count, token_id in enumerate(piece.ids):
        if size_bytes >= piece.header_bytes:
            return count
        size_bytes += len(tokenizer.token_bytes(token_id))
    return len(piece.ids)
