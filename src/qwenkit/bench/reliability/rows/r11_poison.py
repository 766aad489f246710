"""Row 11: three hundred attackers beside eight victims, whose every bit stays."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from qwenkit.bench.http_client import Target, ask
from qwenkit.bench.reliability.board import Board
from qwenkit.bench.reliability.model import LOGITS
from qwenkit.bench.reliability.rows.r12_disconnects import MOMENTS, leave
from qwenkit.bench.reliability.spec import Row, Tally
from qwenkit.bench.reliability.victims import Victims
from qwenkit.bench.reliability.wire import CHAT

_ATTACKERS = 300
_AT_ONCE = 32
_ATTACKS: tuple[dict[str, Any], ...] = (
    {"logit_bias": {str(LOGITS + 5): 100}},
    {"logit_bias": {"100": 1e308}},
    {"logit_bias": {"100": 100, "200": -100}},
    {"bad_words": ["the", "a"]},
    {"allowed_token_ids": [LOGITS - 1]},
    {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 100},
    {"temperature": 100, "top_p": 1e-9, "min_p": 1},
    {"temperature": 0.01, "repetition_penalty": 1e-9},
    {"stop_token_ids": list(range(1000))},
    {"n": 8, "temperature": 1.5},
    {"guided_regex": "[a-z]{1,40}"},
    {"guided_json": {"type": "array", "items": {"type": "integer"}, "maxItems": 9}},
    {"logprobs": True, "top_logprobs": 20, "temperature": 2},
    {"min_tokens": 20, "stop": ["e", "a", " "]},
    {"priority": 1000},
    {"priority": -1000, "timeout_s": 0.05},
)


async def run(board: Board, tally: Tally) -> None:
    """Rounds of all attackers at once; in each all victims answer again and again."""
    server = await board.server()
    victims = Victims(server.target, board.served_name, with_logprobs=True)
    await victims.record()
    for turn in range(board.pick(2, 20)):
        board.say(f"row 11, round {turn + 1}")
        generator = board.random(11, turn)
        async with victims.streaming(tally, f"attackers of round {turn + 1}"):
            await _attack(server.target, board.served_name, generator, tally)
    tally.figures["answers of victims"] = victims.rounds


async def _attack(target: Target, model: str, generator: random.Random, tally: Tally) -> None:
    room = asyncio.Semaphore(_AT_ONCE)

    async def attacker(number: int, choice: int) -> None:
        async with room:
            if choice < len(_ATTACKS):
                answer = await ask(target, CHAT, _content(model, number) | _ATTACKS[choice])
                tally.count(f"{answer.status // 100}xx")
            else:
                moment = MOMENTS[choice - len(_ATTACKS)]
                await leave(target, model, number, moment, 0.01)
                tally.count("left")

    kinds = len(_ATTACKS) + len(MOMENTS)
    choices = [generator.randrange(kinds) for _ in range(_ATTACKERS)]
    await asyncio.gather(*(attacker(*pair) for pair in enumerate(choices)))


def _content(model: str, number: int) -> dict[str, Any]:
    words = "word " * (1 + number * 7 % 300)
    messages = [{"role": "user", "content": f"{words}{number}"}]
    return {"model": model, "messages": messages, "max_tokens": 24, "seed": number}


ROW = Row(id=11, promise="no neighbour changes a bit of an answer", run=run)
