"""Row 14: a client that wants everything, and one that asks for a little now and then."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

from qwenkit.bench.http_client import Target
from qwenkit.bench.openai_stream import stream_reply
from qwenkit.bench.reliability.board import OTHER_KEY, Board
from qwenkit.bench.reliability.spec import Row, Tally
from qwenkit.bench.reliability.wire import COMPLETIONS, Wire, fault_of_answer
from qwenkit.bench.serving_load import Percentiles

_STREAMS = 200
_STREAM_TOKENS = 600
_MOST_TIMES = 5.0  # the first token of the small client beside the greedy one, over alone
_EVERY_S = 1.0


async def run(board: Board, tally: Tally) -> None:
    """The small client's waits alone, then beside 200 long streams of another key."""
    small = (await board.server()).target
    greedy = replace(small, key=OTHER_KEY)
    model = board.served_name
    count = board.pick(12, 60)
    board.say("row 14, alone")
    alone = await _ask(small, model, tally, count, every_s=0.1)
    await _refusals(greedy, model, tally)
    board.say("row 14, beside 200 streams")
    streams = [asyncio.create_task(_long(greedy, model, number)) for number in range(_STREAMS)]
    try:
        await asyncio.sleep(1.0)
        beside = await _ask(small, model, tally, count, every_s=_EVERY_S)
        busy = sum(not stream.done() for stream in streams)
    finally:
        for stream in streams:
            stream.cancel()
        ended = await asyncio.gather(*streams, return_exceptions=True)
    wrong = [one for one in ended if isinstance(one, str) and one]
    tally.check("the greedy client's streams", not wrong, wrong[:3])
    tally.check("there still were streams at the end", busy > 0, "make them longer")
    first, later = Percentiles.of(alone), Percentiles.of(beside)
    tally.took(later.p99_s)
    tally.figures |= {
        "p50 alone, s": round(first.p50_s, 4),
        "p99 alone, s": round(first.p99_s, 4),
        "p50 beside, s": round(later.p50_s, 4),
        "p99 beside, s": round(later.p99_s, 4),
        "streams left": busy,
    }
    times = later.p99_s / first.p99_s
    tally.check("p99 of the first token", times <= _MOST_TIMES, f"{times:.1f} times alone")


async def _ask(
    target: Target, model: str, tally: Tally, count: int, *, every_s: float
) -> list[float]:
    """The waits for the first token of short requests, one a while."""
    waits = []
    for number in range(count):
        start_s = time.perf_counter()
        content = _content(model, f"Short question {number}.", 8)
        reply = await stream_reply(target, content, timeout_s=60.0)
        tally.check("a short request", reply.is_whole and reply.error is None, reply.error, content)
        waits.append(reply.first_s if reply.first_s is not None else reply.end_s)
        await asyncio.sleep(max(0.0, every_s - (time.perf_counter() - start_s)))
    return waits


async def _refusals(target: Target, model: str, tally: Tally) -> None:
    """What is beyond any limit."""
    many = {"n": 10_000, "prompt": "a"}, {"prompt": ["a"] * 5_000}
    for fields in many:
        wire = Wire(path=COMPLETIONS, content={"model": model, "max_tokens": 8} | fields)
        answer = await wire.send(target)
        refused = 400 <= answer.status < 500 and not fault_of_answer(answer)
        tally.check(f"{max(fields)} beyond the limit", refused, answer.shown, wire.to_json())


async def _long(target: Target, model: str, number: int) -> str:
    """One of the long streams; what went wrong with it before it was left."""
    content = _content(model, f"Long story {number}.", _STREAM_TOKENS) | {"temperature": 1}
    reply = await stream_reply(target, content, timeout_s=300.0)
    refused = reply.status in (429, 503)
    return "" if reply.is_whole or refused else str(reply.error or reply.status)


def _content(model: str, text: str, tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}


ROW = Row(
    id=14,
    promise="a client that asks for little barely notices one that asks for everything",
    run=run,
)
