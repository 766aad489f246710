"""An assistant's next turn, with its text, thoughts and calls of tools told apart as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from qwenkit.api.choices import Choices
from qwenkit.chat.parse import ReplyParser
from qwenkit.chat.render import Rendered
from qwenkit.chat.replies import ReplyFormat
from qwenkit.engine.request import Request
from qwenkit.engine.service import AsyncEventStream, EventStream
from qwenkit.errors import RequestError
from qwenkit.types.completion import Completion
from qwenkit.types.deltas import ReplyDelta
from qwenkit.types.events import Event, FinishEvent, TokenEvent
from qwenkit.types.sampling import SamplingParams
from qwenkit.types.tools import ToolOptions

GivenToolOptions = ToolOptions | Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class ReplyEvent:
    """An event of the engine, and what became certain of the reply with it."""

    event: Event
    deltas: tuple[ReplyDelta, ...] = ()


class ReplyReader:
    """Makes the events of one request into those of a reply."""

    def __init__(self, form: ReplyFormat) -> None:
        self._parser: ReplyParser = form.parser()
        self._stops = form.stops

    def read(self, event: Event) -> ReplyEvent:
        """The next event, with what became certain."""
        if isinstance(event, TokenEvent):
            return ReplyEvent(event, self._parser.push(event.text))
        if isinstance(event, FinishEvent):
            deltas = self._parser.push(event.text)
            return ReplyEvent(event, deltas + self._parser.end(complete=self.is_complete(event)))
        return ReplyEvent(event)

    def is_complete(self, end: FinishEvent | Completion) -> bool:
        """True where the model ended its reply by itself, not a limit or a stop of the user's."""
        return _is_complete(end, self._stops)


@dataclass(frozen=True, slots=True)
class PreparedReply:
    """A request for an assistant's turn, and how to read what comes.

    Each choice of several needs a reader of its own: `reader()`.
    """

    request: Request
    rendered: Rendered

    @property
    def format(self) -> ReplyFormat:
        """How the reply is written."""
        return self.rendered.reply

    def reader(self) -> ReplyReader:
        """A reader at the reply's beginning."""
        return ReplyReader(self.format)

    def requests(self, n: int, best_of: int | None = None) -> list[Request]:
        """A request for each of `n` choices, or of `best_of` candidates; see `LLM.choices`."""
        choices = Choices(self.request.sampling, n, best_of)
        return choices.requests(self._again, self.request.prompt_ids, self.request.options)

    def _again(self, prompt: Any, sampling: Any, options: Any) -> Request:
        return replace(self.request, sampling=sampling)

    def completed(self, completion: Completion) -> Completion:
        """The same with its reply."""
        complete = _is_complete(completion, self.format.stops)
        return replace(completion, reply=self.format.parsed(completion.text, complete=complete))


def _is_complete(end: FinishEvent | Completion, stops: tuple[str, ...]) -> bool:
    reason = end.reason if isinstance(end, FinishEvent) else end.finish_reason
    stop = end.matched_stop
    return reason == "stop" and (not isinstance(stop, str) or stop in stops)


def read_tool_options(given: object) -> ToolOptions:
    """Options of tools as they were given. Raises RequestError for what is no mapping of names."""
    if given is None:
        return ToolOptions()
    if isinstance(given, ToolOptions):
        return given
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise RequestError("tool_options", f"expected ToolOptions or a mapping, got {kind}.")
    return ToolOptions.from_mapping(given)


def reply_sampling(sampling: SamplingParams, form: ReplyFormat) -> SamplingParams:
    """The sampling of a reply in that format."""
    stops = tuple(stop for stop in form.stops if stop not in sampling.stop)
    constraint = form.constraint(sampling.constraint)
    if not stops and constraint is sampling.constraint:
        return sampling
    return sampling.replace(stop=(*sampling.stop, *stops), constraint=constraint)


class ReplyStream(Iterator[ReplyEvent]):
    """A reply's events as they come, the last one that of a `FinishEvent`; closing it aborts the
    request.
    """

    def __init__(self, events: EventStream, reader: ReplyReader) -> None:
        self._events = events
        self._reader = reader

    def __next__(self) -> ReplyEvent:
        return self._reader.read(next(self._events))

    def close(self) -> None:
        """Abort the request unless it has finished; no event follows."""
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncReplyStream(AsyncIterator[ReplyEvent]):
    """The same for `async for`; see `engine.service.AsyncEventStream`."""

    def __init__(self, events: AsyncEventStream, reader: ReplyReader) -> None:
        self._events = events
        self._reader = reader

    async def __anext__(self) -> ReplyEvent:
        return self._reader.read(await anext(self._events))

    async def aclose(self) -> None:
        """Abort the request unless it has finished; no event follows."""
        await self._events.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
