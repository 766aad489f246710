"""Follows a reply that streams in: shows it now and then, and hangs up when told to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field

from qwenkit.web.reply import Piece, Reply

SOONEST_S = 0.06  # between two updates: more would only keep the browser busy
LATEST_S = 5.0  # even without news: Gradio notices only then that nobody looks any more


@dataclass(slots=True)
class Run:
    """One answer under way: `stop` asks it to end, `is_over` says that it has, and `done` that all
    of it has been handed to the page.
    """

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    is_over: bool = False
    pause_s: float = SOONEST_S

    async def end(self) -> None:
        """Stop it and wait until all that it said is kept."""
        self.stop.set()
        await self.done.wait()


async def follow(
    pieces: AsyncGenerator[Piece, None],
    reply: Reply,
    run: Run,
    *,
    explain: Callable[[Exception], str],
) -> AsyncIterator[bool]:
    """Take `pieces` into `reply` until they end or `run.stop` is set.

    Yields True when there is something new to show, `run.pause_s` apart, and False when there was
    nothing for `LATEST_S`. An error of the server becomes the reply's, in the words of `explain`.
    """
    filling = asyncio.create_task(_fill(pieces, reply))
    stopping = asyncio.create_task(run.stop.wait())
    shown, yielded_s = 0, time.monotonic()
    try:
        while not filling.done() and not run.stop.is_set():
            await asyncio.wait(
                {filling, stopping}, timeout=run.pause_s, return_when=asyncio.FIRST_COMPLETED
            )
            is_new = reply.pieces != shown
            if is_new or time.monotonic() - yielded_s > LATEST_S:
                shown = reply.pieces
                yield is_new
                yielded_s = time.monotonic()
    finally:
        filling.cancel()
        stopping.cancel()
        await asyncio.gather(filling, stopping, return_exceptions=True)
    if filling.cancelled():
        reply.stop()
    elif (error := filling.exception()) is not None:
        if not isinstance(error, Exception):
            raise error
        reply.fail(explain(error))


async def _fill(pieces: AsyncGenerator[Piece, None], reply: Reply) -> None:
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            reply.add(piece, time.monotonic())
