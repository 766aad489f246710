"""A plain HTTP/1.1 client on asyncio, for measuring servers and for doing them wrong.

It costs little beside a server on the same two cores, sends bytes that no proper client would, and
says of each answer when its parts came. It follows no redirect and keeps no cookie.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

from qwenkit.errors import NetworkError, UsageError

Header = tuple[str, str]
CLOSED = 0  # the status of an answer that did not come
_JSON_TYPE: Header = ("Content-Type", "application/json")
_LONGEST_LINE = 1 << 20  # bytes
_PORTS = {"http": 80, "https": 443}
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER, on, 0 s


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server, and the key it asks for. `base` is what stands before every path."""

    host: str
    port: int
    is_secure: bool = False
    base: str = ""
    key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, key: str | None = None) -> Self:
        """Of "http://host:port", with or without "/v1" behind it. Raises UsageError."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as error:
            raise UsageError(f"url: {url!r}: {error}.") from error
        if parts.scheme not in _PORTS or not parts.hostname:
            raise UsageError(f"url: expected http://HOST:PORT, got {url!r}.")
        return cls(
            host=parts.hostname,
            port=port or _PORTS[parts.scheme],
            is_secure=parts.scheme == "https",
            base=parts.path.rstrip("/").removesuffix("/v1").rstrip("/"),
            key=key,
        )

    @property
    def url(self) -> str:
        """Without "/v1"."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_secure else 'http'}://{name}:{self.port}{self.base}"

    def headers(self) -> tuple[Header, ...]:
        """What every proper request bears."""
        host = self.url.split("://")[1].removesuffix(self.base)
        own = (("Host", host), ("Accept", "*/*"))
        return own if self.key is None else (*own, ("Authorization", f"Bearer {self.key}"))


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request; `status` 0 and `error` when nothing whole did."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    seconds: float = 0.0
    error: str | None = None

    def json(self) -> Any:
        """The body's value; None where it is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def shown(self) -> str:
        """Status and the beginning of the body, for reports."""
        text = self.error or self.body[:300].decode(errors="replace")
        return f"{self.status or 'no answer'}: {text}"


class Connection:
    """One connection. Methods raise OSError or EOFError where the server ends it."""

    def __init__(
        self, target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.target = target
        self._reader, self._writer = reader, writer
        self.headers: dict[str, str] = {}

    @classmethod
    async def open(cls, target: Target) -> Self:
        """Connect. Raises OSError when nobody listens."""
        reader, writer = await asyncio.open_connection(
            target.host, target.port, ssl=target.is_secure or None, limit=_LONGEST_LINE
        )
        return cls(target, reader, writer)

    async def write(self, data: bytes) -> None:
        """Any bytes."""
        self._writer.write(data)
        await self._writer.drain()

    async def send(
        self, method: str, path: str, body: bytes | None = None, headers: Iterable[Header] = ()
    ) -> None:
        """A whole request; `headers` come after the target's own and replace them by name."""
        await self.write(request_bytes(self.target, method, path, body, headers))

    async def read_head(self) -> int:
        """The status; `headers` has the names in lower case. Interim answers are passed over."""
        while True:
            line = await self._reader.readline()
            words = line.split(None, 2)
            if len(words) < 2 or not words[1].isdigit():
                raise EOFError("the connection was closed without an answer")
            status = int(words[1])
            self.headers = {}
            while (line := await self._reader.readline()).strip():
                name, _, value = line.decode("latin-1").partition(":")
                self.headers[name.strip().lower()] = value.strip()
            if not line:
                raise EOFError("the connection was closed within the head of an answer")
            if status >= 200:
                return status

    async def chunks(self) -> AsyncIterator[bytes]:
        """The parts of the body as they come."""
        if "chunked" in self.headers.get("transfer-encoding", ""):
            while True:
                line = await self._reader.readline()
                if not line:
                    raise EOFError("the connection was closed within a body")
                size = int(line.split(b";")[0], 16)
                data = await self._reader.readexactly(size + 2)
                if not size:
                    return
                yield data[:-2]
        elif (length := self.headers.get("content-length")) is not None:
            left = int(length)
            while left:
                data = await self._reader.read(min(left, 1 << 16))
                if not data:
                    raise EOFError("the connection was closed within a body")
                left -= len(data)
                yield data
        else:
            while data := await self._reader.read(1 << 16):
                yield data

    async def read_body(self) -> bytes:
        """All of it."""
        return b"".join([part async for part in self.chunks()])

    async def events(self) -> AsyncIterator[str]:
        """The data of server-sent events, each when it is whole; comments are passed over."""
        held = b""
        async for part in self.chunks():
            held += part
            *whole, held = held.replace(b"\r\n", b"\n").split(b"\n\n")
            for event in whole:
                lines = [line for line in event.split(b"\n") if line.startswith(b"data:")]
                if lines:
                    yield b"\n".join(line[5:].removeprefix(b" ") for line in lines).decode()

    async def is_ended(self, within_s: float) -> bool:
        """True when the server ends the connection in time, whatever else it says before."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                try:
                    while await self._reader.read(1 << 16):
                        pass
                except OSError:
                    pass
                return True
        return False

    def close(self) -> None:
        """Leave, as a client does that is done."""
        self._writer.close()

    def reset(self) -> None:
        """Leave with a reset in place of a proper end."""
        own: socket.socket | None = self._writer.get_extra_info("socket")
        if own is not None:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._writer.transport.abort()


def request_bytes(
    target: Target,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Iterable[Header] = (),
) -> bytes:
    """A request as it goes over the wire."""
    given = list(headers)
    names = {name.lower() for name, _ in given}
    own = [*target.headers(), *([_JSON_TYPE] if body is not None else [])]
    if body is not None and "transfer-encoding" not in names:
        own.append(("Content-Length", str(len(body))))
    every = [pair for pair in own if pair[0].lower() not in names] + given
    head = f"{method} {target.base}{path} HTTP/1.1\r\n"
    lines = "".join(f"{name}: {value}\r\n" for name, value in every)
    return (head + lines + "\r\n").encode("latin-1", "replace") + (body or b"")


async def ask(
    target: Target,
    path: str,
    content: object = None,
    *,
    method: str = "POST",
    headers: Sequence[Header] = (),
    timeout_s: float = 60.0,
) -> Answer:
    """One request on a connection of its own. `content` is sent as JSON, bytes as they are, None
    without a body. Never raises for what the server does: the answer says it.
    """
    body = content if isinstance(content, bytes) else None
    if content is not None and body is None:
        body = json.dumps(content).encode()
    start_s = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s):
            connection = await Connection.open(target)
            try:
                return await _exchange(connection, path, body, method, headers, start_s)
            finally:
                connection.close()
    except TimeoutError:
        error = f"no answer within {timeout_s:g} s"
    except (OSError, EOFError, ValueError) as failure:
        error = str(failure) or type(failure).__name__
    return Answer(CLOSED, seconds=time.perf_counter() - start_s, error=error)


async def _exchange(
    connection: Connection,
    path: str,
    body: bytes | None,
    method: str,
    headers: Sequence[Header],
    start_s: float,
) -> Answer:
    # A server may refuse a body while it is still being sent, and then read no more of it.
    sending = asyncio.create_task(connection.send(method, path, body, headers))
    try:
        status = await connection.read_head()
        content = b"" if method == "HEAD" else await connection.read_body()
    finally:
        sending.cancel()
        await asyncio.wait([sending])
        if not sending.cancelled():
            sending.exception()  # the answer says enough
    return Answer(status, connection.headers, content, time.perf_counter() - start_s)


async def wait_until_ready(target: Target, path: str, timeout_s: float) -> float:
    """Seconds until `path` is answered with 200. Raises NetworkError when it is not in time."""
    start_s = time.perf_counter()
    answer = Answer(CLOSED)
    while (passed_s := time.perf_counter() - start_s) < timeout_s:
        answer = await ask(target, path, method="GET", timeout_s=5.0)
        if answer.status == 200:
            return time.perf_counter() - start_s
        await asyncio.sleep(0.02)
    raise NetworkError(f"{target.url}{path}: not ready after {passed_s:.0f} s ({answer.shown}).")
