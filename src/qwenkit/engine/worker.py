"""The thread that an engine runs in, and its inbox.

All work on the engine happens in its one thread: others put calls into the inbox, and each
request's events go to a sink of its own.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from qwenkit.engine.active import describe
from qwenkit.engine.constrain import Matcher
from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Request
from qwenkit.errors import RequestError, UsageError
from qwenkit.kernels.cpu import give_back_freed_memory
from qwenkit.types.events import Event, FinishEvent, FinishReason, Usage

_log = logging.getLogger(__name__)
_JOIN_TIMEOUT_S = 60.0  # a step that takes longer is left to end with the process
_REST_S = 2.0  # without a call, after which memory is given back
_CLOSED = "this engine is closed; load the model again to go on."

Sink = Callable[[Event], None]
T = TypeVar("T")


class Worker:
    """An engine and its thread.

    `submit`, `abort` and `stop` may be called from anywhere, `abort` even from a finalizer: it
    takes no lock.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._calls: set[Future[Any]] = set()  # that somebody waits for
        self._lock = threading.Lock()  # of `_open` and of entries coming into `_sinks`, `_calls`
        self._open = True
        self._began_s: float | None = None  # with what the thread does; None while it waits
        self._thread = threading.Thread(target=self._run, name="qwenkit-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._open and self._thread.is_alive()

    @property
    def busy_s(self) -> float:
        """How long the step or the call takes already that the thread is at; 0 while it waits."""
        began_s = self._began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

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
                    self._began_s = time.monotonic()
                    self._deliver(self._step())
            self._shut("abort", None)
        except BaseException:  # whatever ended it, nobody may be left waiting
            _log.exception("the engine thread ended; its requests end with an error")
            self._shut("error", "the engine thread ended; the log says why")

    def _take_calls(self) -> None:
        """Do what is asked for; with nothing else to do, wait for it."""
        if not self.engine.has_work:
            self._began_s = None
            self._do(self._await_call())
        while self._open and not self._inbox.empty():
            self._do(self._inbox.get())

    def _await_call(self) -> Callable[[], None]:
        """The next call; while it does not come, what past requests needed is given back."""
        try:
            return self._inbox.get(timeout=_REST_S)
        except queue.Empty:
            give_back_freed_memory()
            return self._inbox.get()

    def _do(self, call: Callable[[], None]) -> None:
        self._began_s = time.monotonic()
        call()

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
