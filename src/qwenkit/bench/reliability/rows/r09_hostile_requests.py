"""Row 9: the hundred hostile requests, alone and amid eight live streams."""

from __future__ import annotations

from collections.abc import Iterator

from qwenkit.bench.http_client import Answer, Target
from qwenkit.bench.reliability.board import Board
from qwenkit.bench.reliability.failures import kept_failures
from qwenkit.bench.reliability.hostile_requests import HOSTILE, Hostile
from qwenkit.bench.reliability.spec import Row, Tally
from qwenkit.bench.reliability.victims import Victims
from qwenkit.bench.reliability.wire import Wire, fault_of_answer

_TIMEOUT_S = 30.0
_VICTIM_TOKENS = 24  # one of them is asked after each hostile request


async def run(board: Board, tally: Tally) -> None:
    """Send each; what it is answered, whether the server lives, and what its neighbours get."""
    target = await board.target()
    victims = Victims(target, board.served_name, tokens=_VICTIM_TOKENS)
    await victims.record()
    for hostile in (*HOSTILE, *_kept(board)):
        board.say(f"row 9, {hostile.name}")
        await _send(hostile, target, tally, "alone")
        await victims.check(0, tally, hostile.name)
    async with victims.streaming(tally, "the hundred"):
        for hostile in HOSTILE:
            board.say(f"row 9 amid streams, {hostile.name}")
            await _send(hostile, target, tally, "amid streams")
    tally.figures["victims beside the hundred"] = victims.rounds
    tally.figures["worst first token of a victim, s"] = round(victims.worst_first_s, 3)


def _kept(board: Board) -> Iterator[Hostile]:
    for name, given in kept_failures(board.settings.failures, 9):
        if "path" in given:
            wire = Wire.from_json(given)
            yield Hostile(name=name, wire=wire, may_serve=True, is_http=True)


async def _send(hostile: Hostile, target: Target, tally: Tally, where: str) -> None:
    answer = await hostile.wire.send(target, _TIMEOUT_S)
    tally.took(answer.seconds)
    tally.count("no answer" if answer.status == 0 else f"{answer.status // 100}xx")
    fault = _fault(hostile, answer)
    given = hostile.wire.to_json() if fault else None
    tally.check(f"{hostile.name}, {where}", not fault, fault, given)


def _fault(hostile: Hostile, answer: Answer) -> str:
    if hostile.is_http and 400 <= answer.status < 500:
        return ""  # said by the web server, before there is JSON
    if not hostile.may_serve and 200 <= answer.status < 300:
        return f"served what cannot be honoured: {answer.shown}"
    return fault_of_answer(answer, names=hostile.names)


ROW = Row(
    id=9,
    promise="a hostile request is refused by name or answered properly; neighbours get their bytes",
    run=run,
    needs_own_server=False,
)
