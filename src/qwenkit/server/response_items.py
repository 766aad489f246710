"""The output of /v1/responses as it comes: items, and the events that tell of them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from qwenkit.types.deltas import (
    CallArguments,
    CallEnd,
    CallStart,
    ContentDelta,
    ReasoningDelta,
    ReplyDelta,
)

OutputEvent = tuple[str, dict[str, Any]]  # its type, and its fields
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


@dataclass(slots=True)
class Item:
    """One item of the output. Its text is that of a message or a thought, or a call's arguments."""

    kind: str
    place: int
    name: str = ""
    status: str = "in_progress"
    text: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    id: str = ""
    call_id: str = ""

    def __post_init__(self) -> None:
        self.id = f"{_PREFIXES[self.kind]}_{secrets.token_hex(12)}"
        self.call_id = f"call_{secrets.token_hex(12)}"

    def part(self) -> dict[str, Any]:
        """The one part of a message or a thought."""
        part: dict[str, Any] = {"type": _PARTS[self.kind], "text": "".join(self.text)}
        if self.kind == "message":
            part |= {"annotations": [], "logprobs": self.logprobs}
        return part

    def content(self, *, bare: bool = False) -> dict[str, Any]:
        """The item; `bare` without what it says."""
        item: dict[str, Any] = {"id": self.id, "type": self.kind, "status": self.status}
        if self.kind == "function_call":
            arguments = "" if bare else "".join(self.text)
            return item | {"call_id": self.call_id, "name": self.name, "arguments": arguments}
        parts = [] if bare else [self.part()]
        if self.kind == "reasoning":
            return item | {"summary": [], "content": parts}
        return item | {"role": "assistant", "content": parts}

    def where(self) -> dict[str, Any]:
        """The fields by which an event names it."""
        place: dict[str, Any] = {"item_id": self.id, "output_index": self.place}
        return place if self.kind == "function_call" else place | {"content_index": 0}


class Output:
    """All items of an answer."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._open: Item | None = None

    def push(self, delta: ReplyDelta, logprobs: list[Any]) -> Iterator[OutputEvent]:
        """Take a delta, and the log-probabilities of what came with it."""
        if isinstance(delta, CallEnd):
            yield from self.close()
        elif isinstance(delta, CallStart):
            yield from self._open_item("function_call", delta.name)
        elif isinstance(delta, CallArguments):
            yield from self._add("function_call", delta.text, [])
        elif isinstance(delta, ReasoningDelta):
            yield from self._add("reasoning", delta.text, [])
        elif isinstance(delta, ContentDelta):
            yield from self._add("message", delta.text, logprobs)

    def close(self, status: str = "completed") -> Iterator[OutputEvent]:
        """End the item that is open, if one is."""
        item, self._open = self._open, None
        if item is None:
            return
        item.status = status
        text = "".join(item.text)
        if item.kind == "function_call":
            yield (
                "response.function_call_arguments.done",
                item.where() | {"arguments": text, "name": item.name},
            )
        else:
            more = {"logprobs": item.logprobs} if item.kind == "message" else {}
            yield f"response.{_PARTS[item.kind]}.done", item.where() | {"text": text, **more}
            yield "response.content_part.done", item.where() | {"part": item.part()}
        yield "response.output_item.done", {"output_index": item.place, "item": item.content()}

    def content(self) -> list[dict[str, Any]]:
        """All items, whole."""
        return [item.content() for item in self.items]

    def _add(self, kind: str, text: str, logprobs: list[Any]) -> Iterator[OutputEvent]:
        if not text and not logprobs:
            return
        if self._open is None or self._open.kind != kind:
            yield from self._open_item(kind)
        item = self._open
        assert item is not None, "an item was just opened"
        item.text.append(text)
        item.logprobs += logprobs
        name = "function_call_arguments" if kind == "function_call" else _PARTS[kind]
        more = {"logprobs": logprobs} if kind == "message" else {}
        yield f"response.{name}.delta", item.where() | {"delta": text, **more}

    def _open_item(self, kind: str, name: str = "") -> Iterator[OutputEvent]:
        yield from self.close()
        item = self._open = Item(kind, len(self.items), name)
        self.items.append(item)
        added = {"output_index": item.place, "item": item.content(bare=True)}
        yield "response.output_item.added", added
        if kind != "function_call":
            yield "response.content_part.added", item.where() | {"part": item.part()}
