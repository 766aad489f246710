"""Row 17: bodies, headers and crowds that are too large, and clients that are too slow."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections import Counter
from contextlib import suppress

from qwenkit.bench.http_client import CLOSED, Connection, Header, Target, ask, request_bytes
from qwenkit.bench.openai_stream import stream_reply
from qwenkit.bench.reliability.board import Board
from qwenkit.bench.reliability.spec import Row, Tally
from qwenkit.bench.reliability.wire import CHAT

_GB = 10**9
_PIECE = b" " * 65_536
_IDLE_SOCKETS = 500
_MOST_REQUESTS = 32  # of the server that is flooded
_FLOOD = 10  # times as many clients
_MOST_BYTES = 64_000_000
_HEADER_WITHIN_S, _BODY_WITHIN_S = 15.0, 45.0
_RECOVERED_WITHIN_S = 5.0


async def run(board: Board, tally: Tally) -> None:
    """Each on a server of its own with a short line, in parallel where it only waits."""
    async with board.new_server("--max-requests", str(_MOST_REQUESTS)) as server:
        target, model = server.target, board.served_name
        crowd = (_answered(target, model, tally, "before") for _ in range(_MOST_REQUESTS))
        await asyncio.gather(*crowd)  # what the engine needs for so many at once is there now
        board.watch(server)
        before = server.resident_bytes()
        slow = [
            asyncio.create_task(_drip(target, tally, "a header in drips", is_body=False)),
            asyncio.create_task(_drip(target, tally, "a body in drips", is_body=True)),
        ]
        for name, part in (
            ("large bodies", _large(target, tally)),
            ("idle connections", _idle(target, model, tally)),
            ("a flood", _flood(target, model, tally, board.pick(10.0, 60.0))),
        ):
            board.say(f"row 17, {name}")
            await part
            peak = max(0, server.peak_bytes() - before)
            tally.figures[f"most memory until the end of {name}, MB"] = round(peak / 1e6, 1)
        await asyncio.gather(*slow)
        grown = max(0, server.peak_bytes() - before)
        tally.used(grown)
        tally.check("memory", grown <= _MOST_BYTES, f"{grown / 1e6:.0f} MB more")
        tally.check("the server lives", server.is_alive, server.last_words())
        board.measure(tally)


def _content(model: str, tokens: int = 8) -> dict[str, object]:
    messages = [{"role": "user", "content": "Say a word."}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}


async def _answered(target: Target, model: str, tally: Tally, when: str) -> float:
    answer = await ask(target, CHAT, _content(model))
    tally.check(f"an ordinary request {when}", answer.status == 200, answer.shown)
    return answer.seconds


async def _large(target: Target, tally: Tally) -> None:
    declared: tuple[Header, ...] = (("Content-Length", str(_GB)),)
    chunked: tuple[Header, ...] = (("Transfer-Encoding", "chunked"),)
    await _pour(target, tally, "1 GB, announced", declared, b"%s")
    await _pour(target, tally, "1 GB in chunks", chunked, b"%x\r\n%s\r\n")
    bomb = gzip.compress(b" " * 50_000_000)
    cases: tuple[tuple[str, bytes, tuple[Header, ...], tuple[int, ...]], ...] = (
        ("a header of 200 KB", b"{}", (("X-Long", "x" * 200_000),), (431,)),
        ("200,000 levels of JSON", b"[" * 200_000 + b"]" * 200_000, (), (400,)),
        ("a gzip bomb", bomb, (("Content-Encoding", "gzip"),), (400, 413, 415)),
        ("a wrong length", b"{}", (("Content-Length", "-5"),), (400,)),
        ("two lengths", b"{}", (("Content-Length", "2"), ("Content-Length", "9")), (400,)),
    )
    for name, body, headers, statuses in cases:
        answer = await ask(target, CHAT, body, headers=headers, timeout_s=20.0)
        tally.took(answer.seconds)
        tally.check(name, answer.status in statuses, answer.shown)


async def _pour(
    target: Target, tally: Tally, name: str, headers: tuple[Header, ...], form: bytes
) -> None:
    """Send without end until there is an answer."""
    head = request_bytes(target, "POST", CHAT, None, (*headers, ("Content-Type", "text/plain")))
    piece = form % ((_PIECE,) if form == b"%s" else (len(_PIECE), _PIECE))
    start_s, sent, status = time.perf_counter(), 0, CLOSED
    connection = await Connection.open(target)
    reading = asyncio.create_task(connection.read_head())
    with suppress(OSError, EOFError, TimeoutError):
        async with asyncio.timeout(30.0):
            with suppress(OSError):
                await connection.write(head)
                while not reading.done() and sent < _GB:
                    await connection.write(piece)
                    sent += len(piece)
                    await asyncio.sleep(0)
            status = await reading
    reading.cancel()
    connection.close()
    tally.took(time.perf_counter() - start_s)
    tally.check(name, status == 413, f"{status} after {sent / 1e6:.0f} MB")


async def _drip(target: Target, tally: Tally, name: str, *, is_body: bool) -> None:
    """A byte a second: the server must hang up, or say 408."""
    body = b" " * 10_000
    whole = request_bytes(target, "POST", CHAT, body)
    start_s, within_s = time.perf_counter(), _BODY_WITHIN_S if is_body else _HEADER_WITHIN_S
    connection = await Connection.open(target)
    ending = asyncio.create_task(connection.is_ended(within_s + 5))
    with suppress(OSError):
        await connection.write(whole[: len(whole) - len(body)] if is_body else whole[:20])
        while not ending.done():
            await connection.write(b" " if is_body else b"x")
            await asyncio.sleep(1.0)
    ended, seconds = await ending, time.perf_counter() - start_s
    connection.close()
    tally.check(name, ended and seconds <= within_s, f"still open after {seconds:.0f} s")


async def _idle(target: Target, model: str, tally: Tally) -> None:
    opened = [await Connection.open(target) for _ in range(_IDLE_SOCKETS)]
    try:
        seconds = await _answered(target, model, tally, "beside 500 idle connections")
        tally.check("it does not wait for them", seconds <= 1.0, f"{seconds:.1f} s")
    finally:
        for connection in opened:
            connection.close()


async def _flood(target: Target, model: str, tally: Tally, seconds: float) -> None:
    """Ten times the clients that it takes, each asking again at once."""
    seen: Counter[str] = Counter()
    lost: list[str] = []
    end_s = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end_s:
            reply = await stream_reply(target, _content(model, 16), timeout_s=60.0)
            if reply.status == 200:
                seen["served"] += 1
                if not reply.is_whole:
                    lost.append(str(reply.error))
            elif reply.status in (429, 503):
                seen["turned away"] += 1
                if "retry-after" not in reply.headers:
                    lost.append(f"{reply.status} without Retry-After")
                await asyncio.sleep(0.2)  # as a client does that was told to
            else:
                lost.append(f"{reply.status}: {reply.error}")

    await asyncio.gather(*(client() for _ in range(_MOST_REQUESTS * _FLOOD)))
    start_s = time.perf_counter()
    await _answered(target, model, tally, "after the flood")
    recovery_s = time.perf_counter() - start_s
    tally.figures |= dict(seen) | {"recovery, s": round(recovery_s, 3)}
    tally.check("what was accepted was served", not lost, f"{len(lost)}: {lost[:3]}")
    tally.check("some were turned away", seen["turned away"] > 0, dict(seen))
    tally.check("it recovers", recovery_s <= _RECOVERED_WITHIN_S, f"{recovery_s:.1f} s")


ROW = Row(
    id=17,
    promise="what is too large or too slow is turned away by its status, and the rest is served",
    run=run,
)
