"""Row 15: regular expressions, schemas, grammars and choices that mean harm."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from qwenkit.bench.http_client import Answer, Target
from qwenkit.bench.reliability.board import Board
from qwenkit.bench.reliability.failures import kept_failures
from qwenkit.bench.reliability.hostile_constraints import CASES
from qwenkit.bench.reliability.spec import Row, Tally
from qwenkit.bench.reliability.victims import Victims
from qwenkit.bench.reliability.wire import Wire, fault_of_answer

_FIELDS = {
    "regex": "guided_regex",
    "json_schema": "guided_json",
    "grammar": "guided_grammar",
    "choice": "guided_choice",
}
_WITHIN_S = 2.0
_MOST_BYTES = 50_000_000
_SCHEMAS = 1000
_TOKENS = 8
_REST_S = 4.0  # after which a server has given back what it no longer needs


async def run(board: Board, tally: Tally) -> None:
    """Each constraint, then a thousand schemas that differ, beside ordinary streams."""
    server = await board.server()
    target, model = server.target, board.served_name
    victims = Victims(target, model, count=2)
    await victims.record()
    ordinary = Wire(content=_content(model, {"guided_json": True}))
    for _ in range(2):  # what the engine needs for three at once is there then
        sending = _send(ordinary, "any object", target, tally)
        await asyncio.gather(sending, victims.check_all(tally, "any object"))
    board.watch(server)
    before = server.resident_bytes()
    async with victims.streaming(tally, "hostile constraints"):
        for name, given in CASES:
            board.say(f"row 15, {name}")
            fields = {_FIELDS[kind]: value for kind, value in given.items()}
            await _send(Wire(content=_body(model, fields)), name, target, tally)
        for name, kept in kept_failures(board.settings.failures, 15):
            if "path" in kept:
                await _send(Wire.from_json(kept), name, target, tally)
        for number in range(board.pick(_SCHEMAS // 4, _SCHEMAS)):
            schema = {"type": "object", "properties": {f"p{number}": {"type": "integer"}}}
            wire = Wire(content=_content(model, {"guided_json": schema}))
            await _send(wire, "one of many schemas", target, tally)
    await asyncio.sleep(_REST_S)
    grown = server.resident_bytes() - before
    tally.figures["grown, MB"] = round(grown / 1e6, 1)
    tally.check("memory", grown <= _MOST_BYTES, f"{grown / 1e6:.0f} MB more")


def _content(model: str, fields: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Answer."}]
    return {"model": model, "messages": messages, "max_tokens": _TOKENS, "seed": 1} | fields


def _body(model: str, fields: dict[str, Any]) -> bytes:
    """As JSON; what nests too deep for Python's own writer is written as text."""
    try:
        return json.dumps(_content(model, fields)).encode()
    except RecursionError:
        (name,) = fields
        whole = json.dumps(_content(model, {name: None}))
        levels = 10_000
        deep = '{"type":"array","items":' * levels + "{}" + "}" * levels
        return whole.replace("null", deep).encode()


async def _send(wire: Wire, name: str, target: Target, tally: Tally) -> Answer:
    answer = await wire.send(target, timeout_s=30.0)
    tally.took(answer.seconds)
    tally.count("no answer" if not answer.status else f"{answer.status // 100}xx")
    fault = fault_of_answer(answer)
    if not fault and answer.seconds > _WITHIN_S:
        fault = f"took {answer.seconds:.1f} s"
    tally.check(name, not fault, fault, wire.to_json() if fault else None)
    return answer


ROW = Row(
    id=15,
    promise="a hostile constraint is refused or served within 2 s, and leaves less than 50 MB",
    run=run,
)
