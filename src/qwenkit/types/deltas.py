"""What a reply is made of while it comes: text, thoughts, and calls of tools."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of what the assistant says."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the assistant thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; calls of one reply are numbered from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: the JSON text as the model writes it. What was given out is never
    taken back.
    """

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call is complete: `arguments` is all of its text, equal to what the deltas gave.

    `repaired` says that this text is not to the letter what the model wrote.
    """

    index: int
    arguments: str
    repaired: bool = False


ReplyDelta = ContentDelta | ReasoningDelta | CallStart | CallArguments | CallEnd
