"""A thread for an engine: submit from any thread, a notebook or a coroutine, and iterate events.

The only place of the room that knows asyncio and, beside `constrain`, threads. All work on the
engine happens in its one thread; the rest puts calls into its inbox and takes events from queues of
its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from qwenkit.engine.active import describe
from qwenkit.engine.constrain import Matcher
from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Request
from qwenkit.errors import QwenkitError, RequestError, UsageError
from qwenkit.types.events import Event, FinishEvent, FinishReason, Usage

_log = logging.getLogger(__name__)
_JOIN_TIMEOUT_S = 60.0  # a step that takes longer is left to end with the process

_CLOSED = "this engine is closed; load the model again to go on."

Sink = Callable[[Event], None]
T = TypeVar("T")


class EngineService:
    """Owns an engine and the thread that runs it; give the engine to nobody else.

    Use it as a context manager or call `close`. A service that is dropped, or alive when the
    interpreter ends, closes itself.
    """

    def __init__(self, engine: Engine) -> None:
        self._worker = _Worker(engine)  # knows nothing of this object, so that it can be dropped
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
        return AsyncEventStream(self, self._worker, request)

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

    def __init__(
        self, service: EngineService, worker: _Worker, requests: Sequence[Request]
    ) -> None:
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
    """The events of one request, as they come, for the event loop that was running when it was
    made.
    """

    def __init__(self, service: EngineService, worker: _Worker, request: Request) -> None:
        self._done = True
        self._service = service
        self._worker = worker
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._request_id = request.id
        events, loop = self._events, asyncio.get_running_loop()

        def sink(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        self._sink: Sink = sink
        self._starting: asyncio.Task[None] | None = None
        if request.sampling.constraint is None:
            worker.submit([request], [worker.engine.prepare(request)], sink)
        else:  # compiling must not hold up the event loop
            worker.engine.check(request)
            self._starting = asyncio.create_task(_prepare_and_submit(worker, request, sink))
        self._done = False

    async def __anext__(self) -> Event:
        if self._done:
            raise StopAsyncIteration
        try:
            if self._starting is not None:
                await asyncio.wait([self._starting])
                if self._starting.cancelled():  # by a task that closed the stream meanwhile
                    raise StopAsyncIteration
                self._starting.result()
                self._starting = None
            event = await self._events.get()
        except asyncio.CancelledError:
            self._abort()
            raise
        except QwenkitError:  # refused after all: nothing was submitted
            self._done = True
            raise
        self._done = isinstance(event, FinishEvent)
        return event

    async def aclose(self) -> None:
        """Abort the request unless it has finished; no event follows."""
        self._abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._abort()

    def __del__(self) -> None:
        self._abort()

    def _abort(self) -> None:
        if not self._done:
            self._done = True
            if self._starting is not None and not self._starting.done():
                self._starting.cancel()
            self._worker.abort(self._request_id, self._sink)


async def _prepare_and_submit(worker: _Worker, request: Request, sink: Sink) -> None:
    matcher = await asyncio.to_thread(worker.engine.prepare, request)
    worker.submit([request], [matcher], sink)


class _Worker:
    """The engine thread. `submit`, `abort` and `stop` may be called from anywhere, `abort` even
    from a finalizer: it takes no lock.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._calls: set[Future[Any]] = set()  # that somebody waits for
        self._lock = threading.Lock()  # of `_open` and of entries coming into `_sinks`, `_calls`
        self._open = True
        self._thread = threading.Thread(target=self._run, name="qwenkit-engine", daemon=True)
        self._thread.start()

    def submit(
        self, requests: Sequence[Request], matchers: Sequence[Matcher | None], sink: Sink
    ) -> None:
        """Hand over requests, all or none, with what `Engine.prepare` gave for them in the caller's
        thread; their events go to `sink`.
        """
        with self._lock:
            if not self._open:
                raise UsageError(_CLOSED)
            names: set[str] = set()
            for request in requests:
                if request.id in self._sinks or request.id in names:
                    raise RequestError("id", f"request {request.id!r} is already being served.")
                names.add(request.id)
            self._sinks |= dict.fromkeys(names, sink)
            for request, matcher in zip(requests, matchers, strict=True):
                self._inbox.put(partial(self._add, request, matcher))

    def abort(self, request_id: str, sink: Sink | None = None) -> None:
        """Ask for the end of a request; with `sink` only if its events go there, for the id may
        have been taken by a later request.
        """
        self._inbox.put(partial(self._abort, request_id, sink))

    def call(self, work: Callable[[Engine], T]) -> Future[T]:
        """Ask for `work` to be done between two steps."""
        future: Future[T] = Future()
        with self._lock:
            if not self._open:
                raise UsageError(_CLOSED)
            self._calls.add(future)
            self._inbox.put(partial(self._answer, future, work))
        return future

    def _answer(self, future: Future[T], work: Callable[[Engine], T]) -> None:
        self._calls.discard(future)
        try:
            future.set_result(work(self.engine))
        except Exception as error:  # of whoever asked
            future.set_exception(error)

    def stop(self) -> None:
        """Ask for the end of the thread and wait for it."""
        self._inbox.put(self._close)
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_TIMEOUT_S)
            if self._thread.is_alive():
                _log.warning("the engine thread did not end within %.0f s", _JOIN_TIMEOUT_S)

    def _run(self) -> None:
        try:
            while self._open:
                self._take_calls()
                if self._open and self.engine.has_work:
                    self._deliver(self._step())
            self._shut("abort", None)
        except Exception:  # a fault of the program: nobody may be left waiting
            _log.exception("the engine thread ended; its requests end with an error")
            self._shut("error", "the engine thread ended; the log says why")

    def _take_calls(self) -> None:
        """Do what is asked for; with nothing else to do, wait for it."""
        if not self.engine.has_work:
            self._inbox.get()()
        while self._open and not self._inbox.empty():
            self._inbox.get()()

    def _step(self) -> list[Event]:
        try:
            return self.engine.step()
        except Exception as error:
            _log.exception("a step failed; all requests end with an error")
            message = f"the engine failed: {type(error).__name__}: {error}"
            return list(self.engine.abort_all(error=message))

    def _add(self, request: Request, matcher: Matcher | None) -> None:
        try:
            self.engine.add(request, matcher)
        except Exception as error:  # its adapter has gone meanwhile, or a fault of the program
            usage, message = Usage(len(request.prompt_ids), 0), describe(error)
            self._deliver([FinishEvent(request.id, "error", "", usage, error=message)])

    def _abort(self, request_id: str, sink: Sink | None) -> None:
        if sink is None or self._sinks.get(request_id) is sink:
            event = self.engine.abort(request_id)
            if event is not None:
                self._deliver([event])

    def _close(self) -> None:
        self._open = False

    def _deliver(self, events: Iterable[Event]) -> None:
        for event in events:
            name = event.request_id
            sink = self._sinks.get(name)
            if isinstance(event, FinishEvent):
                self._sinks.pop(name, None)
            if sink is None:
                continue
            try:
                sink(event)
            except Exception:  # the event loop of who asked is closed: nobody listens
                _log.warning("nobody takes the events of request %s; it is aborted", name)
                self._sinks.pop(name, None)
                self.engine.abort(name)

    def _shut(self, reason: FinishReason, error: str | None) -> None:
        with self._lock:
            self._open = False  # nothing is added to the inbox or the sinks from now on
        for future in self._calls:  # asked for but not yet done
            future.set_exception(UsageError(_CLOSED))
        with contextlib.suppress(Exception):  # the engine may be what failed
            self._deliver(self.engine.abort_all(error=error))
        for name in list(self._sinks):  # submitted but not yet added
            self._deliver([FinishEvent(name, reason, "", Usage(0, 0), error=error)])
