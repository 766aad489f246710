"""A closed loop of clients at any OpenAI server, over HTTP, streaming.

Each client has one connection and sends its next request when the last one has ended, so that a
server never has more to do than there are clients. Speed is counted in tokens as the server's own
`usage` counts them, waits from when a request was sent.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from qwenkit.bench.http_client import Connection, Target
from qwenkit.bench.openai_stream import CHAT, COMPLETIONS, Reply, stream_reply
from qwenkit.bench.peers.spec import prompt_ids
from qwenkit.bench.serving_load import Percentiles
from qwenkit.errors import NetworkError, UsageError

_WORDS = """time year people way day man thing woman life child world school state family student
group country problem hand part place case week company system program question work number night
point home water room mother area money story fact month lot right study book eye job word business
issue side kind head house service friend father power hour game line end member law car city"""
_VOCABULARY = _WORDS.split()
_ANSWER_TOKENS, _QUESTION_TOKENS = 16, 12  # of a conversation's turns


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadShape:
    """What clients ask: prompts of about `prompt_tokens` (words, or with `vocab_size` so many ids
    to the raw completion route), answers of `answer_tokens`, `requests_each` of them in a turn.

    Raises UsageError naming the setting on construction.
    """

    model: str = "default"
    prompt_tokens: int = 64
    answer_tokens: int = 64
    requests_each: int = 2
    vocab_size: int | None = None
    ignore_eos: bool = False
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "answer_tokens", "requests_each"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: expected at least 1, got {getattr(self, name)}.")

    @property
    def path(self) -> str:
        """The route."""
        return CHAT if self.vocab_size is None else COMPLETIONS

    def content(self, number: int) -> dict[str, Any]:
        """A request; each `number` has another prompt, so that no prefix cache knows it."""
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.answer_tokens,
            "temperature": 0,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.vocab_size is not None:
            return fields | {"prompt": prompt_ids(self.prompt_tokens, self.vocab_size, number)}
        text = f"Number {number}. {words(self.prompt_tokens, number)} Write a story with it."
        return fields | {"messages": [{"role": "user", "content": text}]}


def words(count: int, seed: int) -> str:
    """So many common English words, by seed others."""
    return " ".join(random.Random(seed).choices(_VOCABULARY, k=count))


@dataclass(slots=True)
class TurnResult:
    """One turn of all clients: tokens of all answers over the time from the first request to the
    last token, and every wait.
    """

    tokens: int = 0
    seconds: float = 0.0
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    requests: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """0 where nothing came."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def add(self, reply: Reply) -> None:
        """Count one answer."""
        self.requests += 1
        if reply.error is not None or not reply.is_whole or reply.first_s is None:
            self.errors.append(reply.error or f"status {reply.status}, no whole stream of text")
            return
        self.tokens += reply.tokens
        self.first_s.append(reply.first_s)
        self.between_s += reply.between_s


async def run_turn(target: Target, shape: LoadShape, clients: int, *, turn: int = 0) -> TurnResult:
    """One closed loop. What fails is counted with its words, and never raised."""
    result = TurnResult()
    start_s = time.perf_counter()

    async def client(index: int) -> None:
        connection: Connection | None = None
        for request in range(shape.requests_each):
            number = (turn * 1000 + index) * 1000 + request
            if connection is None:
                with suppress(OSError):
                    connection = await Connection.open(target)
            reply = await stream_reply(
                target,
                shape.content(number),
                path=shape.path,
                timeout_s=shape.timeout_s,
                connection=connection,
            )
            result.add(reply)
            if connection is not None and not reply.is_whole:
                connection.close()
                connection = None
        if connection is not None:
            connection.close()

    await asyncio.gather(*(client(index) for index in range(clients)))
    result.seconds = time.perf_counter() - start_s
    return result


@dataclass(slots=True, kw_only=True)
class LevelResult:
    """All turns at one number of clients."""

    clients: int
    turns: list[TurnResult] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        """The median over turns; None where every turn failed."""
        speeds = [turn.tokens_per_second for turn in self.turns if turn.tokens]
        return statistics.median(speeds) if speeds else None

    @property
    def errors(self) -> list[str]:
        """Of all turns."""
        return [error for turn in self.turns for error in turn.errors]

    @property
    def first(self) -> Percentiles:
        """Waits for the first token."""
        return Percentiles.of([wait for turn in self.turns for wait in turn.first_s])

    @property
    def between(self) -> Percentiles:
        """Waits from one event with text to the next."""
        return Percentiles.of([wait for turn in self.turns for wait in turn.between_s])

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "clients": self.clients,
            "tokens_per_second": self.tokens_per_second,
            "turns": [turn.tokens_per_second for turn in self.turns],
            "first_token": asdict(self.first),
            "between_tokens": asdict(self.between),
            "requests": sum(turn.requests for turn in self.turns),
            "errors": self.errors[:8],
        }


@dataclass(frozen=True, slots=True)
class SecondTurn:
    """Conversations of two turns, asked one at a time: seconds until the first token of each."""

    first_s: tuple[float, ...]
    second_s: tuple[float, ...]
    cached_tokens: int
    prompt_tokens: int

    @property
    def ratio(self) -> float:
        """The median of second over first."""
        pairs = zip(self.first_s, self.second_s, strict=True)
        return statistics.median(second / first for first, second in pairs)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"ratio": self.ratio}


async def measure_second_turn(
    target: Target, shape: LoadShape, *, conversations: int, prompt_words: int
) -> SecondTurn:
    """Ask about a text of `prompt_words`, then once more behind the answer; the first conversation
    warms and is not counted. With a `vocab_size` so many ids, and ids behind them, since a model
    without a chat format cannot be talked to. Raises NetworkError where an answer fails.
    """
    firsts, seconds, cached, prompt = [], [], 0, 0
    for number in range(conversations + 1):
        opening, following = _turns(shape, 10**6 + number, prompt_words)
        first = await _ask(target, shape, opening)
        second = await _ask(target, shape, following(first.text))
        if number and first.first_s is not None and second.first_s is not None:
            firsts.append(first.first_s)
            seconds.append(second.first_s)
            details = second.usage.get("prompt_tokens_details") or {}
            cached = int(details.get("cached_tokens") or 0)
            prompt = int(second.usage.get("prompt_tokens") or 0)
    return SecondTurn(tuple(firsts), tuple(seconds), cached, prompt)


def _turns(
    shape: LoadShape, number: int, prompt_words: int
) -> tuple[dict[str, Any], Callable[[str], dict[str, Any]]]:
    """What the first turn asks, and what the second does when the answer is known."""
    if shape.vocab_size is not None:
        ids = prompt_ids(prompt_words, shape.vocab_size, number)
        more = prompt_ids(_ANSWER_TOKENS + _QUESTION_TOKENS, shape.vocab_size, -number)
        return {"prompt": ids}, lambda answer: {"prompt": [*ids, *more]}
    text = f"Text {number}: {words(prompt_words, number)}. What is it about?"
    messages = [{"role": "user", "content": text}]
    question = {"role": "user", "content": "Say that in fewer words."}
    return {"messages": messages}, lambda answer: {
        "messages": [*messages, {"role": "assistant", "content": answer}, question]
    }


async def _ask(target: Target, shape: LoadShape, asked: Mapping[str, Any]) -> Reply:
    content = {
        "model": shape.model,
        **asked,
        "max_tokens": min(shape.answer_tokens, _ANSWER_TOKENS),
        "temperature": 0,
        "stream_options": {"include_usage": True},
    }
    reply = await stream_reply(target, content, path=shape.path, timeout_s=shape.timeout_s)
    if reply.error is not None or reply.first_s is None:
        raise NetworkError(f"{target.url}: a conversation failed: {reply.error or 'no text came'}")
    return reply
