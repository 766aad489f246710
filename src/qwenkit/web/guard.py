"""The door in front of Gradio: who may come in, to which paths, and what the page may do.

One ASGI middleware. It checks Host (against DNS rebinding), Origin (against other sites' pages),
the password, the path and the size of a body before Gradio sees anything, and puts a
Content-Security-Policy on every answer: scripts only from this process, nothing from outside.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_HERE = Path(__file__).parent
_FILES = {
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/favicon.ico": ("page.svg", "image/svg+xml"),
}
# What the page needs of Gradio. Everything else that Gradio serves (files, uploads, proxies, its
# programming interface) is not there.
_PATHS = re.compile(
    r"/|/(?:config|theme\.css|manifest\.json)|/(?:assets|static/(?:js|fonts|img))(?:/(?!\.)[\w.@-]+)+"
    r"|/gradio_api/(?:queue/(?:join|data)|heartbeat/\w+|cancel|reset|startup-events)"
)
_LARGEST_BODY = 64 * 2**20
_WRONG_PASSWORD_S = 0.5  # a wrong password is answered this late
_HEAD = b'<link rel="stylesheet" href="./page.css"><script src="./page.js" defer></script></head>'
_PREVIEWS = re.compile(rb'<meta\s+(?:property|name)="(?:og|twitter):[^>]*>')


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """`hosts` are the only names by which the page may be called, None allows any; `users` maps
    names to passwords, empty asks for none.
    """

    hosts: Collection[str] | None
    users: MutableMapping[str, str]


class Guard:
    """`app` behind the door; see the module."""

    def __init__(self, app: App, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI call."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            nonce = secrets.token_urlsafe(18)
            await self._http(scope, receive, _Sender(send, nonce, scope["path"] == "/"))

    async def _http(self, scope: Scope, receive: Receive, send: _Sender) -> None:
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            status, words = refusal
            await send.answer(status, words.encode(), "text/plain; charset=utf-8")
        elif not self._is_let_in(headers):
            await asyncio.sleep(_WRONG_PASSWORD_S if "authorization" in headers else 0)
            await send.answer(401, b"A name and a password are needed.", "text/plain")
        elif scope["path"] in _FILES:
            name, kind = _FILES[scope["path"]]
            await send.answer(200, (_HERE / name).read_bytes(), kind)
        else:
            # Plain bytes, so that the page's own HTML can be completed.
            plain = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]
            inner = {**scope, "headers": plain} if scope["path"] == "/" else scope
            await self._app(inner, _bounded(receive), send)

    def _refusal(self, scope: Scope, headers: dict[str, bytes]) -> tuple[int, str] | None:
        host = headers.get("host", b"").decode("latin-1").lower()
        if self._admission.hosts is not None and host_name(host) not in self._admission.hosts:
            return 421, "This page does not answer under that name."
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin.decode("latin-1").lower()).netloc != host:
            return 403, "This page answers only itself."
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, "Not allowed."
        if scope["path"] not in _FILES and not _PATHS.fullmatch(scope["path"]):
            return 404, "Not found."
        length = headers.get("content-length", b"0")
        if not length.isdigit() or int(length) > _LARGEST_BODY:
            return 413, "Too large."
        return None

    def _is_let_in(self, headers: dict[str, bytes]) -> bool:
        users = self._admission.users
        if not users:
            return True
        kind, _, encoded = headers.get("authorization", b"").partition(b" ")
        if kind.lower() != b"basic":
            return False
        try:
            name, colon, password = base64.b64decode(encoded, validate=True).partition(b":")
        except ValueError:
            return False
        known = users.get(name.decode("utf-8", "replace"))
        # The same work for a name that is not there; digests, so that lengths do not show.
        expected = hashlib.sha256((known or "").encode()).digest()
        same = hmac.compare_digest(expected, hashlib.sha256(password).digest())
        return same and known is not None and bool(colon)


def host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    return host.rpartition(":")[0] if re.search(r":\d+\Z", host) else host


def _bounded(receive: Receive) -> Receive:
    """`receive`, until more comes than a body may hold: then the client seems gone."""
    taken = 0

    async def bounded() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        return {"type": "http.disconnect"} if taken > _LARGEST_BODY else message

    return bounded


class _Sender:
    """Sends an answer with the page's headers; completes the page's HTML on the way."""

    def __init__(self, send: Send, nonce: str, is_page: bool) -> None:
        self._send = send
        self._nonce = nonce
        self._is_page = is_page
        self._start: Message = {}
        self._body = bytearray()

    async def answer(self, status: int, body: bytes, kind: str) -> None:
        """A whole answer of this middleware's own."""
        headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(body))]
        if status == 401:
            headers.append((b"www-authenticate", b'Basic realm="qwenkit", charset="UTF-8"'))
        if status == 200:
            headers.append((b"cache-control", b"no-cache"))
        self._is_page = False
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self({"type": "http.response.body", "body": body})

    async def __call__(self, message: Message) -> None:
        """One ASGI message on its way out."""
        if message["type"] == "http.response.start":
            kept = [pair for pair in message["headers"] if pair[0].lower() not in _OURS]
            message = {**message, "headers": [*kept, *_headers(self._nonce)]}
            if self._is_page:
                self._start = message
                return
        elif self._is_page:
            self._body += message.get("body", b"")
            if message.get("more_body"):
                return
            message = {**message, "body": self._completed()}
            pairs = [p for p in self._start["headers"] if p[0].lower() != b"content-length"]
            pairs.append((b"content-length", b"%d" % len(message["body"])))
            await self._send({**self._start, "headers": pairs})
        await self._send(message)

    def _completed(self) -> bytes:
        """Gradio's page with our files, its scripts allowed, and without previews of elsewhere."""
        page = _PREVIEWS.sub(b"", bytes(self._body)).replace(b"</head>", _HEAD, 1)
        return re.sub(rb"<script\b", b'<script nonce="%s"' % self._nonce.encode(), page)


_OURS = frozenset((b"content-security-policy", b"x-frame-options", b"referrer-policy", b"server"))


def _headers(nonce: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-security-policy", content_security_policy(nonce).encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"DENY"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-dns-prefetch-control", b"off"),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"permissions-policy", b"camera=(), microphone=(), geolocation=(), payment=(), usb=()"),
    ]


def content_security_policy(nonce: str) -> str:
    """Scripts of this process only, none compiled from text, none inline without the nonce; nothing
    from outside. Styles may be inline: KaTeX and Gradio place things by them.
    """
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src 'self' 'nonce-{nonce}'",
            "script-src-attr 'none'",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data:",
            "font-src 'self' data:",
            "connect-src 'self'",
            "manifest-src 'self'",
            "frame-src 'none'",
            "object-src 'none'",
            "worker-src 'none'",
            "base-uri 'self'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
