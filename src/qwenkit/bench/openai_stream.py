"""One streamed answer of an OpenAI server: its text, its end, and when its parts came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from qwenkit.bench.http_client import CLOSED, Connection, Target

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_DONE = "[DONE]"


@dataclass(slots=True)
class Reply:
    """What came. `times_s` are the moments of events with text, in seconds after the request was
    sent; `is_whole` says that the stream ended as it should. `status` 0: no answer came.
    """

    status: int = CLOSED
    pieces: list[str] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    is_whole: bool = False
    error: str | None = None
    logprobs: list[Any] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)

    @property
    def first_s(self) -> float | None:
        """Until the first text."""
        return self.times_s[0] if self.times_s else None

    @property
    def between_s(self) -> list[float]:
        """From one event with text to the next."""
        return [later - sooner for sooner, later in pairwise(self.times_s)]

    @property
    def tokens(self) -> int:
        """Of the answer, as the server counts them; events with text where it does not."""
        return int(self.usage.get("completion_tokens") or len(self.times_s))

    def add(self, value: Mapping[str, Any], now_s: float) -> None:
        """Take one event."""
        if value.get("error"):
            self.error = json.dumps(value["error"])
        if value.get("usage"):
            self.usage = dict(value["usage"])
        for choice in value.get("choices") or ():
            delta = choice.get("delta") or {}
            piece = choice.get("text") or delta.get("content") or ""
            if piece or delta.get("tool_calls"):
                self.pieces.append(piece)
                self.times_s.append(now_s)
            self.logprobs += _by_token(choice.get("logprobs") or {})
            self.finish_reason = choice.get("finish_reason") or self.finish_reason


def _by_token(given: Mapping[str, Any]) -> list[Any]:
    """Log-probabilities one token after another, however many came in one event."""
    if "content" in given:
        return list(given["content"] or ())
    names = [name for name in ("tokens", "token_logprobs", "top_logprobs") if given.get(name)]
    return [list(each) for each in zip(*(given[name] for name in names), strict=True)]


async def stream_reply(
    target: Target,
    content: Mapping[str, Any],
    *,
    path: str = CHAT,
    timeout_s: float = 120.0,
    connection: Connection | None = None,
) -> Reply:
    """Ask with `"stream": true` and read to the end, on a `connection` that stays open or a new
    one. Never raises for what the server does: the reply says it.
    """
    reply, own = Reply(), connection
    body = json.dumps({**content, "stream": True}).encode()
    start_s = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s):
            own = connection or await Connection.open(target)
            await own.send("POST", path, body)
            reply.status = await own.read_head()
            reply.headers = own.headers
            if reply.status != 200:
                reply.error = (await own.read_body())[:1000].decode(errors="replace")
            else:
                await _read(own, reply, start_s)
    except TimeoutError:
        reply.error = f"not ended within {timeout_s:g} s"
    except (OSError, EOFError, ValueError) as error:
        reply.error = reply.error or str(error) or type(error).__name__
    finally:
        if own is not None and own is not connection:
            own.close()
    reply.end_s = time.perf_counter() - start_s
    return reply


async def _read(connection: Connection, reply: Reply, start_s: float) -> None:
    async for data in connection.events():
        now_s = time.perf_counter() - start_s
        if data.strip() == _DONE:
            reply.is_whole = True
            continue  # the body's own end follows
        reply.add(json.loads(data), now_s)
