"""Looks at every request before anything else does: a pure ASGI layer around the application.

What it lets through has a host and an origin that may ask, a key, a header and a body of bounded
size that came in bounded time, and JSON that is JSON. It gives each request an id, ends the work on
it when its client leaves, and writes its log line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwenkit.server.auth import Doorman
from qwenkit.server.errors import ApiError, described
from qwenkit.server.facts import KEY, Facts
from qwenkit.server.hosts import Origins, allowing, preflight
from qwenkit.server.json_body import read_json
from qwenkit.server.settings import ServerSettings

OPEN_PATHS = frozenset(("/health", "/ready"))  # what answers without a key
log = logging.getLogger("qwenkit.server.requests")
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_OF_A_BODY = frozenset((b"content-length", b"transfer-encoding"))
_DRAINED_BYTES = 4 << 20
_DRAINED_S = 1.0
Pairs = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class _Answer:
    """Sends the answer, with the headers that all answers have, and remembers how far it is."""

    send: Send
    facts: Facts
    headers: Pairs
    unread: Receive | None = None  # where a body still comes from that nobody has read
    started: bool = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.facts.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self.headers]}
        await self.send(message)

    async def refuse(self, error: ApiError) -> None:
        """The whole answer that an error makes. A body that was not read is taken a little longer,
        so that a client that still sends gets to read why, and then the connection is closed.
        """
        self.facts.error = error.code or error.kind
        body = error.body(self.facts.path)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *((name.encode(), value.encode("latin-1")) for name, value in error.headers.items()),
        ]
        if self.unread is not None:
            headers.append((b"connection", b"close"))
        await self({"type": "http.response.start", "status": error.status, "headers": headers})
        if self.unread is not None:
            await self({"type": "http.response.body", "body": body, "more_body": True})
            await _read_away(self.unread)
            body = b""
        await self({"type": "http.response.body", "body": body})


class Guard:
    """`app` behind the checks. `takes_body` says to which paths something is posted: any other body
    stays unread. `draining` says when no new work is taken; `observe` is called with
    the facts of each request that has ended.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        *,
        takes_body: Callable[[str], bool],
        draining: Callable[[], bool],
        observe: Callable[[Facts], None],
    ) -> None:
        self._app = app
        self._settings = settings
        self._doorman = Doorman(settings.access)
        self._origins = Origins(settings.access)
        self._takes_body = takes_body
        self._draining = draining
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers: Pairs = list(scope["headers"])
        facts = Facts(_request_id(headers), scope["method"], scope["path"])
        answer = _Answer(send, facts, [(b"x-request-id", facts.request_id.encode())])
        if any(name in _OF_A_BODY and value != b"0" for name, value in headers):
            answer.unread = receive
        try:
            await self._serve(scope, receive, answer, headers)
        finally:
            facts.end_s = time.perf_counter()
            self._observe(facts)
            log.info("request", extra={"fields": facts.line()})

    async def _serve(self, scope: Scope, receive: Receive, answer: _Answer, headers: Pairs) -> None:
        facts = answer.facts
        try:
            if self._is_preflight(scope, headers, answer):
                await self._allow_preflight(headers, answer)
                return
            body = await self._let_in(scope, receive, answer, headers)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("a request failed", extra={"fields": facts.line()})
            await answer.refuse(described(error))
            return
        inner = {**scope, KEY: facts}
        if scope["method"] == "HEAD":
            inner["method"] = "GET"  # the web server leaves the body out
        inner["headers"] = [h for h in headers if h[0] != b"content-type"]
        inner["headers"].append((b"content-type", b"application/json"))
        await _run(self._app, inner, _Rest(body, receive), answer)

    def _is_preflight(self, scope: Scope, headers: Pairs, answer: _Answer) -> bool:
        asks = _values(headers, b"access-control-request-method")
        return scope["method"] == "OPTIONS" and bool(asks)

    async def _allow_preflight(self, headers: Pairs, answer: _Answer) -> None:
        host = self._origins.check_host(_values(headers, b"host"))
        origins = _values(headers, b"origin")
        origin = self._origins.check_origin(origins[0] if origins else None, host)
        asked = b", ".join(_values(headers, b"access-control-request-headers"))
        more = preflight(origin, asked) if origin is not None else []
        await answer({"type": "http.response.start", "status": 204, "headers": more})
        await answer({"type": "http.response.body", "body": b""})

    async def _let_in(
        self, scope: Scope, receive: Receive, answer: _Answer, headers: Pairs
    ) -> bytes:
        """The body of a request that may be served. Raises ApiError."""
        facts, settings = answer.facts, self._settings
        line = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
        if line + sum(len(n) + len(v) + 4 for n, v in headers) > settings.max_header_bytes:
            raise header_too_large(settings.max_header_bytes)
        if scope["path"] in OPEN_PATHS and scope["method"] in ("GET", "HEAD"):
            return b""
        host = self._origins.check_host(_values(headers, b"host"))
        origins = _values(headers, b"origin")
        origin = self._origins.check_origin(origins[0] if origins else None, host)
        if origin is not None:
            answer.headers += allowing(origin)
        facts.key = facts.client = self._doorman.identify(_values(headers, b"authorization"))
        if not self._doorman.has_many and self._settings.access.is_open and scope.get("client"):
            facts.client = str(scope["client"][0])
        if self._draining():
            raise shutting_down()
        if scope["method"] != "POST" or not self._takes_body(scope["path"]):
            return b""
        body = await self._body(receive, headers)
        answer.unread = None
        facts.value = await read_json(body)
        return body

    async def _body(self, receive: Receive, headers: Pairs) -> bytes:
        most, timeout_s = self._settings.max_body_bytes, self._settings.body_timeout_s
        encoding = b",".join(_values(headers, b"content-encoding")).strip().lower()
        if encoding not in (b"", b"identity"):
            name = encoding.decode("latin-1")
            raise ApiError(
                415,
                f"A body in the encoding {name!r:.40} is not taken; send it plain.",
                code="bad_encoding",
            )
        lengths = _values(headers, b"content-length")
        if lengths and lengths[0].isdigit() and int(lengths[0][:20]) > most:
            raise _too_large(most)
        try:
            async with asyncio.timeout(timeout_s):
                return await _read(receive, most)
        except TimeoutError:
            raise ApiError(
                408, f"The body did not come within {timeout_s:g} s.", code="request_timeout"
            ) from None


class _Rest:
    """What the application may receive: the body that was read, then whatever comes."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self.receive = receive

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.Event().wait()  # the guard itself looks out for a client that leaves
        raise AssertionError("nothing sets that event")


async def _run(app: ASGIApp, scope: Scope, rest: _Rest, answer: _Answer) -> None:
    """Let the application answer; when the client leaves, it is cancelled."""
    work = asyncio.ensure_future(app(scope, rest, answer))
    gone = asyncio.ensure_future(_disconnected(rest.receive))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()
            answer.facts.error = answer.facts.error or "client_left"
        with contextlib.suppress(asyncio.CancelledError, OSError):
            try:
                await work
            except OSError:
                raise  # the connection broke while it was written to
            except Exception as error:
                log.exception("a request failed", extra={"fields": answer.facts.line()})
                if not answer.started:
                    await answer.refuse(described(error))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(receive: Receive, most: int) -> bytes:
    """The whole body, of at most so many bytes."""
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "The client left before its body had come.", code="client_left")
        piece = message.get("body", b"")
        size += len(piece)
        if size > most:
            raise _too_large(most)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


async def _read_away(receive: Receive) -> None:
    """Take a little of a body that nobody wants. Who still sends then is kept waiting: a connection
    that is closed while its client sends is reset, and the answer on it is lost.
    """
    size = 0
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(_DRAINED_S):
            while size < _DRAINED_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
            await asyncio.sleep(_DRAINED_S)


def header_too_large(most: int) -> ApiError:
    """What is said of a header beyond the limit."""
    return ApiError(431, f"The header has more than {most:,} bytes.", code="header_too_large")


def shutting_down() -> ApiError:
    """What is said while the server ends."""
    message = "The server is shutting down; ask again in a moment."
    return ApiError(503, message, code="shutting_down", headers={"retry-after": "5"})


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The body has more than {most:,} bytes.", code="body_too_large")


def _values(headers: Pairs, name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


def _request_id(headers: Pairs) -> str:
    """The client's own id of the request, if it is a sensible one, or a new one."""
    given = _values(headers, b"x-request-id")
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return given[0].decode()
    return f"req_{secrets.token_hex(12)}"


class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)
