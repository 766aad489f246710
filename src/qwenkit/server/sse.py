"""Streams to clients: server-sent events, and lines of JSON.

The generator runs up to its first piece before the answer's head is sent, so that what is wrong by
then is an ordinary error with its status.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from json.encoder import encode_basestring
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwenkit.server.errors import ApiError, described
from qwenkit.server.facts import facts_of

log = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"
_COMMENT = b": keep-alive\n\n"
_PIECE = 4096
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def json_text(value: str) -> str:
    """A text as JSON, its characters as they are."""
    return encode_basestring(value)


def compact(value: Any) -> str:
    """A JSON value without spaces, its characters as they are."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class Json(str):
    """A text that is JSON already, within a value that is to be written."""


def assembled(value: Any) -> str:
    """As `compact`, of a value that may have `Json` in it."""
    if isinstance(value, Json):
        return value
    if isinstance(value, dict):
        pairs = (f"{json_text(name)}:{assembled(inner)}" for name, inner in value.items())
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{','.join(map(assembled, value))}]"
    return compact(value)


def in_pieces(values: Sequence[Any]) -> Json:
    """A long list as JSON, written so that in a thread it lets others have their turns."""
    starts = range(0, len(values), _PIECE)
    return Json(f"[{','.join(compact(values[i : i + _PIECE])[1:-1] for i in starts)}]")


def event(data: str, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {data}\n\n".encode("utf-8", "replace")


def json_answer(value: Any, status: int = 200) -> Response:
    """A whole JSON answer."""
    content = assembled(value).encode("utf-8", "replace")
    return Response(content, status, media_type="application/json")


class Streamed(Response):
    """An answer that is sent as it comes.

    `pieces` yields what is sent. After `keep_alive_s` of silence a comment is, where the format has
    comments. What goes wrong once the head is sent becomes the last piece, made by `as_piece`.
    """

    media_type = "text/event-stream"
    comment: bytes | None = _COMMENT

    def __init__(self, pieces: AsyncGenerator[bytes], *, keep_alive_s: float) -> None:
        super().__init__(media_type=self.media_type, headers=_HEADERS)
        del self.headers["content-length"]
        self._pieces = pieces
        self._keep_alive_s = keep_alive_s
        self._silent = True

    def as_piece(self, error: ApiError) -> bytes:
        """An error as the last event."""
        return event(compact(error.content()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            first = await anext(self._pieces)
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            pinging = asyncio.create_task(self._ping(send))
            try:
                await _send(send, first)
                await self._send_rest(send, facts_of(scope).line)
            finally:
                pinging.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._pieces.aclose()

    async def _send_rest(self, send: Send, facts: Any) -> None:
        try:
            async for piece in self._pieces:
                self._silent = False
                await _send(send, piece)
        except Exception as error:
            refusal = described(error)
            if not isinstance(error, ApiError):
                log.exception("a stream failed", extra={"fields": facts()})
            elif refusal.status >= 500:
                log.error(refusal.message, extra={"fields": facts()})
            await _send(send, self.as_piece(refusal))

    async def _ping(self, send: Send) -> None:
        while self.comment is not None:
            self._silent = True
            await asyncio.sleep(self._keep_alive_s)
            if self._silent:
                await _send(send, self.comment)


class JsonLinesStream(Streamed):
    """Lines of JSON, as Ollama sends them."""

    media_type = "application/x-ndjson"
    comment = None

    def as_piece(self, error: ApiError) -> bytes:
        """An error as the last line."""
        return compact({"error": error.message}).encode("utf-8", "replace") + b"\n"


async def _send(send: Send, piece: bytes) -> None:
    if piece:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
