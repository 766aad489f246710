"""An engine in a thread of its own: submit from any thread, a notebook or a coroutine, and iterate
events. The only place of the room that knows asyncio.
"""

from __future__ import annotations

import asyncio
import queue
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar

from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Request
from qwenkit.engine.worker import Sink, Worker
from qwenkit.errors import QwenkitError
from qwenkit.types.events import Event, FinishEvent, Usage

T = TypeVar("T")


class EngineService:
    """Owns an engine and the thread that runs it; give the engine to nobody else.

    Use it as a context manager or call `close`. A service that is dropped, or alive when the
    interpreter ends, closes itself.
    """

    def __init__(self, engine: Engine) -> None:
        self._worker = Worker(engine)  # knows nothing of this object, so that it can be dropped
        self._stop = weakref.finalize(self, self._worker.stop)

    def stream(self, request: Request) -> EventStream:
        """Submit a request; iterate its events, the last one a `FinishEvent`.

        Raises RequestError when it cannot be served, UsageError after `close`. The request runs
        whether or not it is iterated; closing or dropping the iterator, or interrupting who waits
        for an event, aborts it.
        """
        return EventStream(self, self._worker, [request])

    def stream_many(self, requests: Iterable[Request]) -> EventStream:
        """Like `stream` for several requests that run together; their events are mixed. If one of
        them is refused, none is submitted.
        """
        return EventStream(self, self._worker, list(requests))

    def generate(self, requests: Iterable[Request]) -> list[list[Event]]:
        """Serve requests together; the events of each, in the order of the requests."""
        requests = list(requests)
        events: dict[str, list[Event]] = {request.id: [] for request in requests}
        with self.stream_many(requests) as stream:
            for event in stream:
                events[event.request_id].append(event)
        return list(events.values())

    def astream(self, request: Request) -> AsyncEventStream:
        """Like `stream`, for `async for` in the running event loop. Cancelling the task that waits
        for an event aborts the request. A constraint that is refused raises RequestError where the
        first event is waited for.
        """
        return AsyncEventStream(self, self._worker, [request])

    def astream_many(self, requests: Iterable[Request]) -> AsyncEventStream:
        """Like `astream` for several requests that run together; their events are mixed. If one of
        them is refused, none is submitted.
        """
        return AsyncEventStream(self, self._worker, list(requests))

    @property
    def is_alive(self) -> bool:
        """False when nothing that is submitted will ever be answered. Any thread may ask."""
        return self._worker.is_alive

    @property
    def busy_s(self) -> float:
        """How long the engine's thread has been at one step or call; 0 while it waits for work. Any
        thread may ask.
        """
        return self._worker.busy_s

    def abort(self, request_id: str) -> None:
        """End a request; its stream still gets the finish event. Unknown ids are ignored."""
        self._worker.abort(request_id)

    def call(self, work: Callable[[Engine], T]) -> T:
        """Do `work` with the engine in its thread, between two steps; its result, or its error.

        Raises UsageError after `close`. Not to be called in the engine's thread.
        """
        return self._worker.call(work).result()

    @property
    def engine(self) -> Engine:
        """For what any thread may ask of it."""
        return self._worker.engine

    def close(self) -> None:
        """Abort what runs, end the thread and wait for it. Closing twice does nothing."""
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class EventStream(Iterator[Event]):
    """The events of one or more requests, as they come, until all have finished."""

    def __init__(self, service: EngineService, worker: Worker, requests: Sequence[Request]) -> None:
        self._pending: set[str] = set()  # until they are accepted there is nothing to abort
        self._service = service  # kept alive by its streams
        self._worker = worker
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._sink: Sink = self._events.put
        worker.submit(requests, [worker.engine.prepare(one) for one in requests], self._sink)
        self._pending |= {request.id for request in requests}

    def __next__(self) -> Event:
        if not self._pending:
            raise StopIteration
        try:
            event = self._events.get()
        except BaseException:  # Ctrl-C: its traceback may keep this stream for as long as it likes
            self.close()
            raise
        if isinstance(event, FinishEvent):
            self._pending.discard(event.request_id)
        return event

    def close(self) -> None:
        """Abort what has not finished; no event follows."""
        while self._pending:
            self._worker.abort(self._pending.pop(), self._sink)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncEventStream(AsyncIterator[Event]):
    """The events of one or more requests, as they come, for the event loop that was running when it
    was made, until all have finished.
    """

    def __init__(self, service: EngineService, worker: Worker, requests: Sequence[Request]) -> None:
        self._pending: set[str] = set()  # until they are accepted there is nothing to abort
        self._service = service  # kept alive by its streams
        self._worker = worker
        self._events: deque[Event] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._loop = loop = asyncio.get_running_loop()
        put = self._put

        def sink(event: Event) -> None:
            loop.call_soon_threadsafe(put, event)

        self._sink: Sink = sink
        self._starting: asyncio.Task[None] | None = None
        if all(request.sampling.constraint is None for request in requests):
            worker.submit(requests, [worker.engine.prepare(one) for one in requests], sink)
        else:  # compiling must not hold up the event loop
            for request in requests:
                worker.engine.check(request)
            self._starting = asyncio.create_task(_prepare_and_submit(worker, requests, sink))
        self._pending |= {request.id for request in requests}

    async def accepted(self) -> None:
        """Wait until all is checked and submitted. Raises RequestError for a constraint that is
        refused.
        """
        if self._starting is None:
            return
        try:
            await asyncio.wait([self._starting])
        except asyncio.CancelledError:
            self._abort()
            raise
        starting, self._starting = self._starting, None
        try:
            if not starting.cancelled():  # by a task that closed the stream meanwhile
                starting.result()
        except QwenkitError:  # refused after all: nothing was submitted
            self._pending.clear()
            raise

    async def ready(self) -> list[Event]:
        """All events that have come since they were last asked for, at least one; an empty list
        after the last.
        """
        await self.accepted()
        events: list[Event] = []
        while self._pending and not events:
            if not self._events:
                await self._wait()
            coming, self._events = self._events, deque()
            events = [event for event in coming if self._is_awaited(event)]
        return events

    async def __anext__(self) -> Event:
        await self.accepted()
        while self._pending:
            if not self._events:
                await self._wait()
            elif self._is_awaited(event := self._events.popleft()):
                return event
        raise StopAsyncIteration

    def fail(self, error: str) -> None:
        """End what has not finished, as if the engine had ended it with this error: for when the
        engine itself no longer can.
        """
        for name in list(self._pending):
            self._put(FinishEvent(name, "error", "", Usage(0, 0), error=error))
            self._worker.abort(name, self._sink)

    def abort(self) -> None:
        """End what has not finished; no event follows."""
        self._abort()

    async def aclose(self) -> None:
        """As `abort`, as asynchronous iterators have it."""
        self._abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._abort()

    def __del__(self) -> None:
        self._abort()

    def _is_awaited(self, event: Event) -> bool:
        """False for what comes of a request after its end."""
        is_awaited = event.request_id in self._pending
        if isinstance(event, FinishEvent):
            self._pending.discard(event.request_id)
        return is_awaited

    def _put(self, event: Event) -> None:
        self._events.append(event)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def _wait(self) -> None:
        """Until an event is there; a task that is cancelled meanwhile aborts the requests."""
        self._waiting = self._loop.create_future()
        try:
            await self._waiting
        except asyncio.CancelledError:
            self._abort()
            raise

    def _abort(self) -> None:
        pending, self._pending = self._pending, set()
        if not pending:
            return
        self._events.clear()
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
        for name in pending:
            self._worker.abort(name, self._sink)


async def _prepare_and_submit(worker: Worker, requests: Sequence[Request], sink: Sink) -> None:
    matchers = [await asyncio.to_thread(worker.engine.prepare, one) for one in requests]
    worker.submit(requests, matchers, sink)
