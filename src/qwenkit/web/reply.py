"""A reply while it comes: pieces in, at any moment the turn that they make so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwenkit.types.messages import ToolCall
from qwenkit.web.conversation import Stats, Turn


@dataclass(frozen=True, slots=True)
class CallPiece:
    """More of the call at `index`; what is None or empty adds nothing."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """The server's own counts of tokens."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one event of the stream adds."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallPiece, ...] = ()
    finish: str | None = None
    usage: Usage | None = None
    model: str = ""

    @property
    def says_something(self) -> bool:
        """It carries some of the reply itself."""
        return bool(self.text or self.reasoning or self.calls)


@dataclass(slots=True)
class _Call:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


class Reply:
    """Gathers the pieces of one reply. Times are seconds of one monotonic clock."""

    def __init__(self, *, model: str, started_s: float) -> None:
        self._model = model
        self._started_s = started_s
        self._first_s: float | None = None
        self._last_s = started_s
        self._pieces = 0
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, _Call] = {}
        self._usage = Usage()
        self._ended = ""
        self._error = ""

    @property
    def pieces(self) -> int:
        """How many pieces that said something have come."""
        return self._pieces

    def add(self, piece: Piece, now_s: float) -> None:
        """Take in one piece that came at `now_s`."""
        if piece.says_something:
            self._pieces += 1
            self._last_s = now_s
            if self._first_s is None:
                self._first_s = now_s
        self._text.append(piece.text)
        self._reasoning.append(piece.reasoning)
        for more in piece.calls:
            call = self._calls.setdefault(more.index, _Call())
            call.id = more.id or call.id
            call.name = more.name or call.name
            call.arguments.append(more.arguments or "")
        self._ended = piece.finish or self._ended
        self._usage = piece.usage or self._usage
        self._model = piece.model or self._model

    def stop(self) -> None:
        """The user has stopped it; a reply that had already ended stays as it is."""
        self._ended = self._ended or "stopped"

    def fail(self, words: str) -> None:
        """It broke off, for the reason in `words`."""
        self._ended, self._error = "error", words

    def turn(self) -> Turn:
        """All that has come, as a turn. A call without an id gets the number of its place."""
        first_s = None if self._first_s is None else self._first_s - self._started_s
        stats = Stats(
            prompt_tokens=self._usage.prompt_tokens,
            cached_tokens=self._usage.cached_tokens,
            completion_tokens=self._usage.completion_tokens,
            pieces=self._pieces,
            first_s=first_s,
            total_s=self._last_s - self._started_s,
        )
        return Turn(
            role="assistant",
            text="".join(self._text),
            reasoning="".join(self._reasoning),
            calls=tuple(
                ToolCall(c.name, "".join(c.arguments), id=c.id or f"call_{index}")
                for index, c in sorted(self._calls.items())
            ),
            model=self._model,
            ended=self._ended,
            error=self._error,
            stats=stats,
        )
