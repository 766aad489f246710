"""Row 5: chat templates that are code or bombs, in the model's folder and in requests."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from qwenkit.bench.http_client import ask
from qwenkit.bench.openai_stream import stream_reply
from qwenkit.bench.process import run_program
from qwenkit.bench.reliability.board import Board
from qwenkit.bench.reliability.hostile_templates import BOMBS, CODE, HOSTILE
from qwenkit.bench.reliability.model import BoardModel
from qwenkit.bench.reliability.spec import Row, Tally
from qwenkit.bench.reliability.victims import Victims
from qwenkit.bench.reliability.wire import CHAT, COMPLETIONS, Wire, fault_of_answer

_WORKER = "qwenkit.bench.reliability.template_worker"
_MOST_S, _MOST_BYTES = 1.0, 10_000_000
_WORKER_WITHIN_S = 300.0
_BOMB = BOMBS["long loop"]
_NEIGHBOUR_WITHIN_S = 0.3


async def run(board: Board, tally: Tally) -> None:
    """Every template as the folder's own, rendered in a process; then over HTTP."""
    await _of_the_folder(board, tally)
    await _of_requests(board, tally)
    await _served(board, tally)


async def _of_the_folder(board: Board, tally: Tally) -> None:
    board.say("row 5, templates of the folder")
    command = [sys.executable, "-m", _WORKER, str(board.model)]
    cwd = Path.cwd()
    text = await asyncio.to_thread(run_program, command, cwd=cwd, timeout_s=_WORKER_WITHIN_S)
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    found = {line["name"]: line for line in lines if "name" in line}
    worst = 0
    for name, source in HOSTILE.items():
        line = found.get(name)
        if line is None:
            tally.check(name, False, f"the process ended: {text[-300:]}", {"template": source})
            continue
        tally.took(line["seconds"])
        worst = max(worst, line["bytes"])
        refused = line["outcome"].startswith("refused")
        held = refused and line["seconds"] <= _MOST_S and line["bytes"] <= _MOST_BYTES
        tally.check(name, held, line, {"template": source})
    tally.figures["most memory of a template, MB"] = round(worst / 1e6, 1)


async def _of_requests(board: Board, tally: Tally) -> None:
    """A request brings a template along, as a field or among the template's arguments."""
    target = await board.target()
    victims = Victims(target, board.served_name, count=2)
    await victims.record()
    messages = [{"role": "user", "content": "hi"}]
    async with victims.streaming(tally, "templates in requests"):
        for name, source in CODE.items():
            for fields in (
                {"chat_template": source},
                {"chat_template_kwargs": {"chat_template": source, "messages": source}},
            ):
                content = {"model": board.served_name, "messages": messages, "max_tokens": 4}
                wire = Wire(content=content | fields)
                answer = await wire.send(target)
                fault = fault_of_answer(answer)
                tally.check(f"{name}, in {max(fields)}", not fault, fault, wire.to_json())


async def _served(board: Board, tally: Tally) -> None:
    """A model whose own template is a bomb: its chat is refused, and nobody waits for it."""
    board.say("row 5, a model whose template is a bomb")
    model = board.make_model(BoardModel(template=_BOMB))
    async with board.new_server(model=model) as server:
        plain = {"model": board.served_name, "prompt": "a", "max_tokens": 4}
        for _ in range(3):
            await stream_reply(server.target, plain, path=COMPLETIONS)
        chat = {"model": board.served_name, "messages": [{"role": "user", "content": "hi"}]}
        bombs = [asyncio.create_task(ask(server.target, CHAT, chat)) for _ in range(4)]
        worst_s = 0.0
        while not all(bomb.done() for bomb in bombs):
            start_s = time.perf_counter()
            reply = await stream_reply(server.target, plain, path=COMPLETIONS)
            tally.check("a neighbour of the bomb", reply.is_whole, reply.error)
            worst_s = max(worst_s, time.perf_counter() - start_s)
        for bomb in bombs:
            answer = bomb.result()
            tally.check("a chat of the bomb", not fault_of_answer(answer), answer.shown)
        tally.figures["worst wait of a neighbour, s"] = round(worst_s, 3)
        late = f"{worst_s:.2f} s"
        tally.check("nobody waits for the bomb", worst_s <= _NEIGHBOUR_WITHIN_S, late)
        board.measure(tally)


ROW = Row(
    id=5,
    promise="a hostile template runs no code, takes at most 1 s and 10 MB, and nobody waits for it",
    run=run,
)
