"""HTTP on a connection, with bounds that uvicorn's own protocol lacks: size and time of a header,
and what an idle connection may cost.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, ClassVar

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from qwenkit.server.errors import ApiError
from qwenkit.server.guard import header_too_large

_REASONS = {
    400: b"Bad Request",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a connection, and all of them, may take."""

    max_connections: int
    max_header_bytes: int
    header_timeout_s: float


class BoundedProtocol(HttpToolsProtocol):
    """Answers 503 to a connection too many, 431 to a header that is too long, 408 to one that
    does not come in time, and 400 to what is no HTTP.
    """

    bounds: ClassVar[Bounds]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._header_bytes = 0
        self._in_header = True
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.bounds.max_connections:
            message = f"{self.bounds.max_connections} connections are open already."
            self._refuse(ApiError(503, message, code="too_many_connections"))
            return
        self._wait_for_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_header:
            self._header_bytes += len(data)
            self._wait_for_header()
        super().data_received(data)
        # What stood behind the header in the same piece was counted with it, hence the slack.
        if self._in_header and self._header_bytes > self.bounds.max_header_bytes:
            self._refuse(header_too_large(self.bounds.max_header_bytes))

    def on_message_begin(self) -> None:
        self._in_header = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_header = False
        self._header_bytes = 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_header = True

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "This is no HTTP request.", code="bad_request"))

    def _header_is_late(self) -> None:
        self._late = None
        if self.transport.is_closing():
            return
        if self._header_bytes:
            message = f"The header did not come within {self.bounds.header_timeout_s:g} s."
            self._refuse(ApiError(408, message, code="request_timeout"))
        else:  # nothing was ever sent
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer before there is a request, and hang up."""
        if self.transport.is_closing():
            return
        body = error.body()
        head = b"HTTP/1.1 %d %s\r\n" % (error.status, _REASONS[error.status])
        head += b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        self.transport.write(head + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def _wait_for_header(self) -> None:
        if self._late is None:
            timeout_s = self.bounds.header_timeout_s
            self._late = self.loop.call_later(timeout_s, self._header_is_late)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def bounded(bounds: Bounds) -> type[HttpToolsProtocol]:
    """The protocol with these bounds."""
    return type("BoundedProtocol", (BoundedProtocol,), {"bounds": bounds})
