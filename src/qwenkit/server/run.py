"""Runs the application on a port until it is told to end, and lets what runs end first."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import uvicorn

from qwenkit.api import AsyncLLM
from qwenkit.server.app import guarded
from qwenkit.server.door import BACKLOG
from qwenkit.server.protocol import Bounds, bounded
from qwenkit.server.served import SHUTTING_DOWN, Served
from qwenkit.server.settings import ServerSettings

log = logging.getLogger("qwenkit.server")
_LOOK_S = 0.05


class _Server(uvicorn.Server):
    """Takes no new work from the first signal on; the second one ends all at once."""

    def __init__(self, config: uvicorn.Config, served: Served) -> None:
        super().__init__(config)
        self._served = served

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._served.draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._served.draining = True
        log.info("draining", extra={"fields": {"answers": self._served.requests}})
        ending = asyncio.create_task(self._end_late())
        try:
            # uvicorn closes the door first; until answers have ended who comes is told by a 503.
            while self._served.requests and not self.force_exit:
                await asyncio.sleep(_LOOK_S)
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            # Else uvicorn sends the signal again, at the end, and nothing behind it is cleaned up.
            self._captured_signals.clear()

    async def _end_late(self) -> None:
        """What has not ended in time gets an error as its end, not a broken connection."""
        await asyncio.sleep(self._served.settings.drain_s)
        self._served.end_all(SHUTTING_DOWN)


async def _serve(
    llm: AsyncLLM, settings: ServerSettings, listening: socket.socket, ready: Callable[[], None]
) -> None:
    served = Served(llm, settings)
    bounds = Bounds(
        max_connections=settings.max_connections,
        max_header_bytes=settings.max_header_bytes,
        header_timeout_s=settings.header_timeout_s,
    )
    config = uvicorn.Config(
        guarded(served),
        http=bounded(bounds),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=round(settings.idle_timeout_s),
        timeout_graceful_shutdown=round(settings.drain_s) + 5,
    )
    server = _Server(config, served)
    announcing = asyncio.create_task(_announce(server, ready))
    try:
        await server.serve(sockets=[listening])
    finally:
        announcing.cancel()


async def _announce(server: _Server, ready: Callable[[], None]) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    ready()


def serve(
    llm: AsyncLLM,
    settings: ServerSettings,
    listening: socket.socket,
    *,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve `llm` on a bound socket until SIGTERM or SIGINT; `ready` is called when it listens.

    The first signal lets running answers end for `settings.drain_s`, a second one does not.
    """
    runner = asyncio.Runner(loop_factory=_loop_factory())
    with suppress(KeyboardInterrupt), runner:
        runner.run(_serve(llm, settings, listening, ready))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's, where it is installed: a third of the time for each token that is sent."""
    found: Callable[[], asyncio.AbstractEventLoop] | None
    found = uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()
    return found or asyncio.new_event_loop
