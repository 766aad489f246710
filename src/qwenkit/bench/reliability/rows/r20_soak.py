"""Row 20: many mixed requests, a tenth of them left; memory, files and threads stay."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress

from qwenkit.bench.openai_stream import stream_reply
from qwenkit.bench.reliability.board import Board
from qwenkit.bench.reliability.rows.r12_disconnects import MOMENTS, leave
from qwenkit.bench.reliability.spec import Row, Tally
from qwenkit.bench.server_process import ServerProcess

_CLIENTS = 8
_LEFT_SHARE = 0.1
_MOST_SLOPE = 1024  # bytes a request
_SHORT_MOST_SLOPE = 4096  # of a short run, where an allocator's steps of half a MB weigh more
_WARM_REQUESTS = 700
_FEW = 4  # files and threads that may come and go


async def run(board: Board, tally: Tally) -> None:
    """Ask for a while; a line through what was resident, request by request, must be flat."""
    seconds, most = board.pick((25.0, 10**9), (1800.0, 20_000))
    async with board.new_server() as server:
        await _ask(server, board, seconds, _WARM_REQUESTS, tally, [])
        points: list[tuple[int, int]] = []
        files, threads = server.open_files(), server.threads()
        done = await _ask(server, board, seconds, most, tally, points)
        await asyncio.sleep(0.5)
        slope = slope_of(points)
        tally.figures |= {"requests": done, "bytes a request": round(slope)}
        most_slope = board.pick(_SHORT_MOST_SLOPE, _MOST_SLOPE)
        tally.check("memory", slope <= most_slope, f"{slope:.0f} bytes a request")
        more = server.open_files() - files
        tally.check("open files", more <= _FEW, f"{more} more")
        more = server.threads() - threads
        tally.check("threads", more <= _FEW, f"{more} more")
        board.measure(tally)


async def _ask(
    server: ServerProcess,
    board: Board,
    seconds: float,
    most: int,
    tally: Tally,
    points: list[tuple[int, int]],
) -> int:
    generator = board.random(20)
    end_s, done = time.perf_counter() + seconds, 0

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < end_s and done < most:
            done += 1
            number = done
            if generator.random() < _LEFT_SHARE:
                with suppress(OSError, EOFError):
                    moment = generator.choice(MOMENTS)
                    await leave(server.target, board.served_name, number, moment, 0.01)
                continue
            reply = await stream_reply(server.target, _content(generator, board, number))
            if reply.error is not None or not reply.is_whole:
                tally.check("a request", False, reply.error)
            tally.took(reply.end_s)
            if number % 20 == 0:
                points.append((number, server.anonymous_bytes()))

    await asyncio.gather(*(client() for _ in range(_CLIENTS)))
    tally.check("requests were answered", done > _CLIENTS, done)
    return done


def _content(generator: random.Random, board: Board, number: int) -> dict[str, object]:
    words = "word " * generator.randrange(1, 60)
    return {
        "model": board.served_name,
        "messages": [{"role": "user", "content": f"{number} {words}"}],
        "max_tokens": generator.randrange(1, 32),
        "temperature": generator.choice((0, 1)),
        "seed": number,
    }


def slope_of(points: list[tuple[int, int]]) -> float:
    """Of the line through points with the least squared error; 0 of fewer than two."""
    if len(points) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


ROW = Row(id=20, promise="memory, files and threads do not grow with the requests", run=run)
