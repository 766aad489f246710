"""Row 19: the engine dies or hangs, the process is killed or told to end, the disk is full."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from qwenkit.bench.http_client import Target, ask
from qwenkit.bench.openai_stream import Reply, stream_reply
from qwenkit.bench.reliability.board import KEY, Board
from qwenkit.bench.reliability.spec import Row, Tally
from qwenkit.bench.server_process import HOST, ServerProcess, free_port, own_command

_STREAMS = 20
_WITHIN_S = 2.0
_LONG_TOKENS = 900
_SHORT_TOKENS = 200
_STEP_S = 2  # that the engine that hangs has for a step
_FAULTY = "qwenkit.bench.reliability.faulty_server"


async def run(board: Board, tally: Tally) -> None:
    """Rounds of each way to end."""
    for turn in range(board.pick(2, 20)):
        board.say(f"row 19, the engine dies, round {turn + 1}")
        await _engine_fails(board, tally, "dies", signal.SIGUSR1, _WITHIN_S)
    board.say("row 19, the engine hangs")
    await _engine_fails(board, tally, "hangs", signal.SIGUSR2, _WITHIN_S + _STEP_S)
    for turn in range(board.pick(1, 20)):
        board.say(f"row 19, kill -9, round {turn + 1}")
        await _killed(board, tally)
    board.say("row 19, SIGTERM")
    await _drained(board, tally)
    board.say("row 19, a full disk")
    await _full_disk(board, tally)


def _command(board: Board, port: int, *, is_faulty: bool = False) -> list[str]:
    options = ("--api-key", KEY, "--threads", str(board.settings.threads))
    command = own_command(board.model, port, (*options, "--kv-cache-tokens", "65536"))
    if is_faulty:
        command += ["--step-seconds", str(_STEP_S)]
        command[command.index("qwenkit")] = _FAULTY
    return command


@asynccontextmanager
async def _streaming(
    board: Board, tokens: int, *, is_faulty: bool = False
) -> AsyncIterator[tuple[ServerProcess, list[asyncio.Task[Reply]]]]:
    """A server with streams under way, each of which has begun."""
    port = free_port()
    target = Target(host=HOST, port=port, key=KEY)
    with ServerProcess(_command(board, port, is_faulty=is_faulty), target) as server:
        await server.wait_until_ready()
        tasks = [
            asyncio.create_task(stream_reply(target, _content(board, number, tokens)))
            for number in range(_STREAMS)
        ]
        await asyncio.sleep(1.0)
        try:
            yield server, tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _content(board: Board, number: int, tokens: int) -> dict[str, object]:
    return {
        "model": board.served_name,
        "messages": [{"role": "user", "content": f"Story {number}."}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 1,
        "seed": number,
    }


async def _check_ends(
    tasks: list[asyncio.Task[Reply]], tally: Tally, what: str, within_s: float = _WITHIN_S
) -> None:
    """Every client has its end in time, and those cut short know it. What goes beyond _WITHIN_S is
    a limit that has to pass first.
    """
    begun_s = time.perf_counter()
    running = [task for task in tasks if not task.done()]
    tally.check(f"{what}: streams were under way", len(running) == _STREAMS, len(running))
    _, hung = await asyncio.wait(tasks, timeout=within_s)
    tally.took(time.perf_counter() - begun_s - (within_s - _WITHIN_S))
    for task in tasks:
        if task in hung:
            tally.check(f"{what}: a client", False, "hung")
            continue
        reply = task.result()
        told = reply.error is not None or reply.finish_reason == "abort"
        tally.check(f"{what}: a client", told, f"was told that its answer is whole: {reply.text!r}")


async def _engine_fails(
    board: Board, tally: Tally, how: str, number: signal.Signals, within_s: float
) -> None:
    async with _streaming(board, _LONG_TOKENS, is_faulty=True) as (server, tasks):
        start_s = time.perf_counter()
        server.send(number)
        await _check_ends(tasks, tally, f"the engine {how}", within_s)
        status, seconds = 0, 0.0
        while status != 503 and seconds <= within_s and server.is_alive:
            status = (await ask(server.target, "/health", method="GET", timeout_s=2.0)).status
            seconds = time.perf_counter() - start_s
        tally.figures[f"until /health is 503 when it {how}, s"] = round(seconds, 3)
        in_time = status == 503 and seconds <= within_s
        tally.check(f"/health turns 503 when the engine {how}", in_time, status)
        answer = await ask(server.target, "/v1/models", method="GET", timeout_s=2.0)
        refused = await stream_reply(server.target, _content(board, 0, 8), timeout_s=5.0)
        wrong = f"{answer.shown}; {refused.status} {refused.error}"
        tally.check("a new request is refused with 503", refused.status == 503, wrong)


async def _killed(board: Board, tally: Tally) -> None:
    async with _streaming(board, _LONG_TOKENS) as (server, tasks):
        server.send(signal.SIGKILL)
        await _check_ends(tasks, tally, "kill -9")
        port = server.target.port
        with ServerProcess(_command(board, port), server.target) as again:
            seconds = await again.wait_until_ready()
            reply = await stream_reply(again.target, _content(board, 0, 8))
            tally.figures["from a new start to ready, s"] = round(seconds, 2)
            tally.check("it serves again on the same port", reply.is_whole, reply.error)


async def _drained(board: Board, tally: Tally) -> None:
    async with _streaming(board, _SHORT_TOKENS) as (server, tasks):
        running = sum(not task.done() for task in tasks)
        tally.check("SIGTERM: streams were under way", running > 0, running)
        server.send(signal.SIGTERM)
        await asyncio.sleep(0.2)
        late = await stream_reply(server.target, _content(board, 0, 8), timeout_s=5.0)
        tally.check("SIGTERM: no new work", late.status in (0, 503), late.status)
        for reply in await asyncio.gather(*tasks):
            tally.check("SIGTERM: a stream ends whole", reply.is_whole, reply.error)
        status = await asyncio.to_thread(server.wait, 10.0)
        ended = status in (0, -signal.SIGTERM)
        tally.check("SIGTERM: it ends by itself", ended, f"status {status}")


async def _full_disk(board: Board, tally: Tally) -> None:
    port = free_port()
    target = Target(host=HOST, port=port, key=KEY)
    with ServerProcess(_command(board, port), target, is_full_disk=True) as server:
        await server.wait_until_ready()
        for number in range(5):
            reply = await stream_reply(target, _content(board, number, 8))
            tally.check("its log cannot be written", reply.is_whole, reply.error)


ROW = Row(
    id=19,
    promise="whatever ends or hangs, clients have an end within 2 s; SIGTERM lets answers finish",
    run=run,
)
