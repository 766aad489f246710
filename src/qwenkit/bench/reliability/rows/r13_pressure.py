"""Row 13: sixty-four requests in a quarter of the memory that they would like."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from qwenkit.bench.openai_stream import Reply, stream_reply
from qwenkit.bench.reliability.board import Board
from qwenkit.bench.reliability.gauges import Rest, time_to_rest
from qwenkit.bench.reliability.spec import Row, Tally
from qwenkit.bench.reliability.tested import run_tests
from qwenkit.bench.server_process import ServerProcess

_REQUESTS = 64
_SHARE = 4
_REST_WITHIN_S = 5.0


async def run(board: Board, tally: Tally) -> None:
    """The same requests with room and without; and the scheduler's own random tests."""
    contents = _contents(board.random(13), board.served_name)
    replies = await _all(await board.server(), contents)
    demand = sum(_tokens(reply) for reply in replies)
    tally.figures["demand, tokens"] = demand
    room = str(demand // _SHARE)
    async with board.new_server("--kv-cache-tokens", room) as server:
        before = Rest.of(server)
        board.say("row 13, in a quarter of the memory")
        pressed = await _all(server, contents)
        for number, (one, other) in enumerate(zip(replies, pressed, strict=True)):
            tally.took(other.end_s)
            same = other.is_whole and (one.text, one.finish_reason) == (
                other.text,
                other.finish_reason,
            )
            detail = other.error or f"{other.text!r} in place of {one.text!r}"
            tally.check(f"request {number}", same, detail, contents[number])
        seconds, wrong = await time_to_rest(server, before, _REST_WITHIN_S)
        tally.check("all blocks are free again", not wrong, f"{wrong} after {seconds:.1f} s")
        board.measure(tally)
    if board.settings.checkout is not None:
        await run_tests(board, tally, ("tests/engine/test_engine_scheduler_random.py",))


def _contents(generator: random.Random, model: str) -> list[dict[str, Any]]:
    contents = []
    for number in range(_REQUESTS):
        words = "word " * generator.randrange(1, 400)
        contents.append(
            {
                "model": model,
                "messages": [{"role": "user", "content": f"{number} {words}"}],
                "max_tokens": generator.randrange(8, 128),
                "temperature": number % 2,
                "seed": number,
                "ignore_eos": True,
                "stream_options": {"include_usage": True},
            }
        )
    return contents


async def _all(server: ServerProcess, contents: list[dict[str, Any]]) -> list[Reply]:
    asked = (stream_reply(server.target, content, timeout_s=300.0) for content in contents)
    return list(await asyncio.gather(*asked))


def _tokens(reply: Reply) -> int:
    return int(reply.usage.get("total_tokens") or 0)


ROW = Row(
    id=13,
    promise="in a quarter of the memory everything ends, with the same text, and gives it back",
    run=run,
)
