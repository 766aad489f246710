"""A small server on asyncio that answers as the OpenAI API does, and misbehaves when told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from qwenkit.bench.http_client import Target

HEAD = b"HTTP/1.1 %d X\r\nContent-Type: %s\r\n"


@dataclass(slots=True)
class FakeServer:
    """`requests` has what came: method, path, headers, body. `spoil` changes an answer's text,
    `break_after` closes a stream after so many events, `status` refuses everything.
    """

    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    spoil: str = ""
    break_after: int | None = None
    status: int = 200
    pause_s: float = 0.0
    connections: int = 0
    most_at_once: int = 0
    _at_once: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        try:
            while line := await reader.readline():
                method, path, _ = line.decode().split()
                headers: dict[str, str] = {}
                while (line := await reader.readline()).strip():
                    name, _, value = line.decode().partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.requests.append((method, path, headers, body))
                await self._answer(writer, path, body)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, path: str, body: bytes) -> None:
        content = json.loads(body) if body else {}
        if self.status != 200 or not content.get("stream"):
            value = {"error": {"message": "no"}} if self.status != 200 else {"path": path}
            text = json.dumps(value).encode()
            writer.write(HEAD % (self.status, b"application/json"))
            writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(text), text))
            await writer.drain()
            return
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        writer.write(HEAD % (200, b"text/event-stream") + b"Transfer-Encoding: chunked\r\n\r\n")
        await self._stream(writer, content, is_chat=path.endswith("chat/completions"))
        self._at_once -= 1

    async def _stream(
        self, writer: asyncio.StreamWriter, content: dict[str, Any], *, is_chat: bool
    ) -> None:
        tokens = int(content["max_tokens"])
        for number in range(tokens):
            if number == self.break_after:
                writer.close()
                return
            piece = f"{number}{self.spoil} "
            choice = {"delta": {"content": piece}} if is_chat else {"text": piece}
            choice |= {"finish_reason": "length" if number == tokens - 1 else None}
            _chunk(writer, f": a comment\n\ndata: {json.dumps({'choices': [choice]})}\n\n")
            await writer.drain()
            await asyncio.sleep(self.pause_s)
        usage = {"completion_tokens": tokens, "prompt_tokens": 9}
        usage |= {"prompt_tokens_details": {"cached_tokens": 4}}
        _chunk(writer, f"data: {json.dumps({'choices': [], 'usage': usage})}\r\n\r\n")
        _chunk(writer, "data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def _chunk(writer: asyncio.StreamWriter, text: str) -> None:
    """In two pieces, so that an event may stand in both."""
    data = text.encode()
    for part in (data[:5], data[5:]):
        writer.write(b"%x\r\n%s\r\n" % (len(part), part))


@asynccontextmanager
async def running(fake: FakeServer) -> AsyncIterator[Target]:
    """The server, listening; and how to reach it."""
    listening = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    try:
        yield Target(host="127.0.0.1", port=port, key="k")
    finally:
        listening.close()
