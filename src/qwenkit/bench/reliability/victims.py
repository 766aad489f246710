"""Ordinary requests that run beside something bad, and must not notice it.

Each has a seed of its own. What it answers alone is recorded first; whatever runs beside it later,
its text, and its log-probabilities where they are asked for, must be the same to the last byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from qwenkit.bench.http_client import Target
from qwenkit.bench.openai_stream import Reply, stream_reply
from qwenkit.bench.reliability.spec import Tally
from qwenkit.errors import QwenkitError

_WORDS = ("river", "stone", "lamp", "winter", "bread", "engine", "silver", "window")


@dataclass(slots=True)
class Victims:
    """`count` requests to a server, of `tokens` each; half greedy, half sampled."""

    target: Target
    model: str
    count: int = 8
    tokens: int = 48
    with_logprobs: bool = False
    expected: list[Reply] = field(default_factory=list)
    rounds: int = 0
    worst_first_s: float = 0.0

    def content(self, number: int) -> dict[str, Any]:
        """The request of one of them."""
        word = _WORDS[number % len(_WORDS)]
        content: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": f"Say {number} things of a {word}."}],
            "max_tokens": self.tokens,
            "temperature": number % 2,
            "seed": number,
        }
        return content | ({"logprobs": True, "top_logprobs": 3} if self.with_logprobs else {})

    async def record(self) -> None:
        """Ask each alone. Raises QwenkitError where even that fails."""
        for number in range(self.count):
            reply = await stream_reply(self.target, self.content(number))
            if reply.error is not None or not reply.is_whole:
                raise QwenkitError(f"an ordinary request failed alone: {reply.error}")
            self.expected.append(reply)

    async def check(self, number: int, tally: Tally, beside: str) -> None:
        """Ask one of them again, and count whether it is the same."""
        reply = await stream_reply(self.target, self.content(number))
        tally.check(
            f"victim {number} beside {beside}",
            same(reply, self.expected[number]),
            f"{reply.error or reply.text!r} in place of {self.expected[number].text!r}",
            {"victim": number, "beside": beside},
        )
        self.worst_first_s = max(self.worst_first_s, reply.first_s or reply.end_s)

    async def check_all(self, tally: Tally, beside: str) -> None:
        """All of them at once."""
        await asyncio.gather(*(self.check(number, tally, beside) for number in range(self.count)))

    @asynccontextmanager
    async def streaming(self, tally: Tally, beside: str) -> AsyncIterator[None]:
        """All of them, again and again, while the block runs; each ends its last one."""
        is_over = asyncio.Event()

        async def ask(number: int) -> None:
            while not is_over.is_set():
                await self.check(number, tally, beside)
                self.rounds += 1

        tasks = [asyncio.create_task(ask(number)) for number in range(self.count)]
        try:
            yield
        finally:
            is_over.set()
            await asyncio.gather(*tasks)


def same(reply: Reply, expected: Reply) -> bool:
    """Text, end and log-probabilities."""
    return (
        reply.is_whole
        and reply.text == expected.text
        and reply.finish_reason == expected.finish_reason
        and reply.logprobs == expected.logprobs
    )
