"""The model that is served, who has work in it, and whether it still answers."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar
from weakref import WeakSet

from qwenkit import __version__
from qwenkit.api import AsyncLLM
from qwenkit.engine.request import Request
from qwenkit.engine.service import AsyncEventStream
from qwenkit.errors import suggest
from qwenkit.server.errors import ApiError
from qwenkit.server.settings import ServerSettings

_LOOK_S = 0.25  # how often it is asked whether the engine lives
_AT_ONCE = 2  # prompts of one client that are made in threads at one time
_COMPILED_AT_ONCE = 2
_COMPILE_S = 10.0  # for all answers of a request; the engine bounds each one
FAULTS = {
    "dead": "The engine has ended; the server must be started again.",
    "stuck": "A step of the engine does not end; the server may have to be started again.",
}
SHUTTING_DOWN = "The server is shutting down."
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """A served name: what answers bear as `model`, and the adapter it stands for."""

    name: str
    adapter: str | None


@dataclass(slots=True)
class _Turn:
    """One client's places in threads, and how many use or wait for them."""

    free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))
    users: int = 0


class Served:
    """One per server. All of it runs in the event loop."""

    def __init__(self, llm: AsyncLLM, settings: ServerSettings) -> None:
        self.llm = llm
        self.settings = settings
        self.created = int(time.time())
        self.draining = False
        self._waiting: Counter[str] = Counter()  # answers that are asked for, by client
        self._turns: dict[str, _Turn] = {}
        self._compiling = asyncio.Semaphore(_COMPILED_AT_ONCE)
        self._streams: WeakSet[AsyncEventStream] = WeakSet()
        self._fingerprint = _fingerprint(llm)

    @property
    def fingerprint(self) -> str:
        """Stands for the model, its weights and what computes them."""
        return self._fingerprint

    @property
    def is_alive(self) -> bool:
        """False when the engine has ended, or is stuck."""
        return self.state == "ok"

    @property
    def state(self) -> Literal["ok", "dead", "stuck"]:
        """Of the engine; from "stuck" it may come back."""
        if not self.llm.is_alive:
            return "dead"
        return "ok" if self.llm.busy_s <= self.settings.step_s else "stuck"

    @property
    def requests(self) -> int:
        """Answers that are computed or wait."""
        return self._waiting.total()

    def names(self) -> list[Target]:
        """What is served: the model under its names, then the adapters."""
        default = self.llm.default_adapter
        own = [Target(name, default) for name in self.settings.names]
        return own + [Target(name, name) for name in self.llm.adapters]

    def target(self, name: str | None) -> Target:
        """Whom a request means. Raises ApiError 404 for a name that nothing is served under."""
        known = self.names()
        if name is None or name == "default":
            return known[0]
        for target in known:
            if name == target.name:
                # Every name of the model itself is answered as the first.
                return known[0] if name in self.settings.names else target
        if name in self.settings.aliases:
            return known[0]
        near = suggest(name, [target.name for target in known])
        raise ApiError(
            404,
            f"The model {name!r:.200} is not served here. {near} "
            "To serve under another name start with --served-model-name.",
            "model",
            "model_not_found",
        )

    @contextmanager
    def admitted(self, client: str, answers: int) -> Iterator[None]:
        """A place for so many answers while they are computed. Raises ApiError 429 when there is
        none, and 400 when there never is.

        Half a place more is kept for who has less than an even share of them: one client's
        requests alone turn nobody else away.
        """
        most, held = self.settings.max_requests, self._waiting[client]
        clients = len(self._waiting) + (not held)
        total, share = self.requests + answers, most // (2 * clients)
        if answers > most:
            raise ApiError(
                400,
                f"n: {answers} answers are asked for at once, n for each prompt; this server "
                f"computes at most {most}. Ask for fewer, in several requests.",
                "n",
                "invalid_value",
            )
        if total > most and (held + answers > share or total > most + most // 2):
            raise ApiError(
                429,
                f"{self.requests} answers are being computed or wait already; at most {most} may. "
                "Ask again in a moment.",
                code="queue_full",
                headers={"retry-after": "1"},
            )
        self._waiting[client] += answers
        try:
            yield
        finally:
            self._waiting[client] -= answers
            if not self._waiting[client]:
                del self._waiting[client]

    async def in_thread(self, client: str, work: Callable[[], T]) -> T:
        """What `work` gives, computed beside the event loop. One client has few threads at a time,
        so that its many requests do not keep the others waiting for one.
        """
        async with self._turn(client):
            return await asyncio.to_thread(work)

    async def submit(self, client: str, requests: Sequence[Request]) -> AsyncEventStream:
        """The stream of requests that the engine has taken. What their outputs must be is compiled
        before, for few at a time. Raises RequestError, and ApiError when compiling takes long.
        """
        state = self.state
        if state != "ok":
            raise ApiError(503, FAULTS[state], code=f"engine_{state}")
        if all(request.sampling.constraint is None for request in requests):
            return self._watched(self.llm.stream_requests(requests))
        async with self._turn(client), self._compiling:
            stream = self._watched(self.llm.stream_requests(requests))
            try:
                async with asyncio.timeout(_COMPILE_S):
                    await stream.accepted()
            except TimeoutError:
                raise ApiError(
                    400,
                    f"What the output must be takes more than {_COMPILE_S:g} s to compile for all "
                    f"{len(requests)} answers; ask for fewer, or for something simpler.",
                    code="invalid_value",
                ) from None
        return stream

    @asynccontextmanager
    async def _turn(self, client: str) -> AsyncIterator[None]:
        turn = self._turns.setdefault(client, _Turn())
        turn.users += 1
        try:
            async with turn.free:
                yield
        finally:
            turn.users -= 1
            if not turn.users:
                del self._turns[client]

    def _watched(self, stream: AsyncEventStream) -> AsyncEventStream:
        """The stream, which ends with an error should the engine end without a word."""
        self._streams.add(stream)
        return stream

    async def look_after(self) -> None:
        """End all streams when the engine has ended or is stuck; runs until it is cancelled."""
        before = "ok"
        while True:
            state = self.state
            if state != "ok" != before:  # by now the engine's own last events have come, if any do
                self.end_all(FAULTS[state])
            before = state
            await asyncio.sleep(_LOOK_S)

    def end_all(self, error: str) -> None:
        """End every stream with this error."""
        for stream in list(self._streams):
            stream.fail(error)

    @asynccontextmanager
    async def looked_after(self) -> AsyncIterator[None]:
        """Inside this block `look_after` runs."""
        looking = asyncio.create_task(self.look_after())
        try:
            yield
        finally:
            looking.cancel()


def _fingerprint(llm: AsyncLLM) -> str:
    record, settings = llm.record, llm.engine_settings
    weights = (record.quantization, record.stored_dtype, llm.weights, settings.kv_dtype)
    facts = (__version__, record.name, record.vocab_rows, weights)
    return f"fp_{hashlib.sha256(repr(facts).encode()).hexdigest()[:10]}"
