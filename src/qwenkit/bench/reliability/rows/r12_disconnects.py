"""Row 12: clients that leave, in every way and at every moment, leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import suppress

from qwenkit.bench.http_client import Connection, Target, request_bytes
from qwenkit.bench.reliability.board import Board
from qwenkit.bench.reliability.gauges import Rest, time_to_rest
from qwenkit.bench.reliability.spec import Row, Tally
from qwenkit.bench.reliability.victims import Victims
from qwenkit.bench.reliability.wire import CHAT

_CLIENTS = 500
_AT_ONCE = 25
_REST_WITHIN_S = 2.0
_LEFT_WITHIN_S = 30.0
MOMENTS = (
    "within the head",
    "within the body",
    "before the answer",
    "in the prefill",
    "in the stream",
    "in the stream, with a reset",
    "after the last token",
)


async def run(board: Board, tally: Tally) -> None:
    """Let the clients leave, then look at what the server still holds."""
    server = await board.server()
    victims = Victims(server.target, board.served_name, count=4)
    await victims.record()
    await _warm(server.target, board.served_name)
    before = Rest.of(server)
    generator, room = board.random(12), asyncio.Semaphore(_AT_ONCE)

    async def one(number: int, moment: str, wait_s: float) -> None:
        async with room:
            with suppress(OSError, EOFError, TimeoutError):
                async with asyncio.timeout(_LEFT_WITHIN_S):
                    await leave(server.target, board.served_name, number, moment, wait_s)
            tally.count(moment)

    async with victims.streaming(tally, "clients that leave"):
        await asyncio.gather(
            *(
                one(number, MOMENTS[number % len(MOMENTS)], generator.random() * 0.05)
                for number in range(_CLIENTS)
            )
        )
    seconds, wrong = await time_to_rest(server, before, 10 * _REST_WITHIN_S)
    tally.took(seconds)
    late = wrong or f"only after {seconds:.1f} s"
    tally.check("all resources are back", not wrong and seconds <= _REST_WITHIN_S, late)
    tally.check("the server lives", server.is_alive, server.last_words())
    await victims.check_all(tally, "nobody")


async def _warm(target: Target, model: str) -> None:
    """As many connections at once as there will be, so that what is made once is there."""
    generator = random.Random(0)
    leaving = (leave(target, model, n, "in the stream", generator.random()) for n in range(4))
    await asyncio.gather(*leaving)
    await asyncio.sleep(0.5)


async def leave(target: Target, model: str, number: int, moment: str, wait_s: float) -> None:
    """One client that leaves at a moment."""
    body = json.dumps(_content(model, number, moment)).encode()
    connection = await Connection.open(target)
    try:
        if moment in ("within the head", "within the body"):
            whole = request_bytes(target, "POST", CHAT, body)
            share = 40 if moment == "within the head" else len(whole) - len(body) // 2
            await connection.write(whole[:share])
            await asyncio.sleep(wait_s)
            return
        await connection.send("POST", CHAT, body)
        if moment == "before the answer":
            return
        if moment == "in the prefill":
            await asyncio.sleep(wait_s / 10)
            return
        await connection.read_head()
        left = 2 + number % 5 if moment.startswith("in the stream") else 10**9
        async for data in connection.events():
            left -= 1
            if not left or data == "[DONE]":
                break
    finally:
        if moment.endswith("reset"):
            connection.reset()
        else:
            connection.close()


def _content(model: str, number: int, moment: str) -> dict[str, object]:
    long = moment == "in the prefill"
    text = f"{number} " + ("word " * 800 if long else "Tell me of rivers.")
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 400 if moment.startswith("in the stream") else 32,
        "stream": True,
        "temperature": 1,
        "seed": number,
    }


ROW = Row(id=12, promise="clients that leave give everything back within 2 s", run=run)
