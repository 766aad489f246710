"""From the engine's events of one answer to what an assistant says."""

from __future__ import annotations

from qwenkit.types.deltas import ContentDelta, ReplyDelta
from qwenkit.types.events import Event, PromptEvent


class Voice:
    """All text is what the assistant says."""

    def push(self, event: Event) -> tuple[ReplyDelta, ...]:
        """What an event adds to the reply."""
        return () if isinstance(event, PromptEvent) else (ContentDelta(event.text),)
