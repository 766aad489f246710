"""Which Host and Origin headers are let in: what stands between a web page and this machine.

A page in the user's browser can send requests to a server on the same machine. It can do so under
its own name, when that name is made to point here (DNS rebinding), which the Host header shows; or
across origins, which the Origin header shows.
"""

from __future__ import annotations

import ipaddress
import platform
from urllib.parse import urlsplit

from qwenkit.server.errors import ApiError
from qwenkit.server.settings import Access

_METHODS = b"GET, POST, DELETE, OPTIONS"
_EXPOSED = b"x-request-id, retry-after"


class Origins:
    """The names under which this server may be addressed, and the pages that may ask it."""

    def __init__(self, access: Access) -> None:
        own = {"localhost", platform.node().lower()} - {""}
        self._hosts = own | {host.lower() for host in access.hosts}
        self._origins = {origin.lower().rstrip("/") for origin in access.origins}

    def check_host(self, values: list[bytes]) -> str:
        """The one Host header, as text. Raises ApiError 400 (421 for a name that is not ours)."""
        if len(values) != 1:
            raise ApiError(400, f"Expected one Host header, got {len(values)}.", code="bad_host")
        given = values[0].decode("latin-1").strip()
        name = _host_name(given)
        if name is None:
            raise ApiError(400, "The Host header is no host.", code="bad_host")
        if "*" in self._hosts or name in self._hosts or _is_address(name):
            return given
        raise ApiError(
            421,
            f"This server is not known as {name!r:.100}. Start it with --allowed-host {name:.100} "
            "to let that name in.",
            code="bad_host",
        )

    def check_origin(self, origin: bytes | None, host: str) -> bytes | None:
        """The origin to be named as allowed in the answer; None where no page asks, or one of this
        server itself. Raises ApiError 403 for the page of another place.
        """
        if origin is None:
            return None
        given = origin.decode("latin-1").strip().lower()
        if "*" in self._origins or given.rstrip("/") in self._origins:
            return origin
        if given != "null" and _authority(given) == host.lower():
            return None
        raise ApiError(
            403,
            f"Pages of {given!r:.100} may not use this server. Start it with --allow-origin to let "
            "them.",
            code="bad_origin",
        )


def allowing(origin: bytes) -> list[tuple[bytes, bytes]]:
    """The headers that let a browser hand an answer to a page of this origin."""
    return [
        (b"access-control-allow-origin", origin),
        (b"access-control-expose-headers", _EXPOSED),
        (b"vary", b"origin"),
    ]


def preflight(origin: bytes, asked_headers: bytes) -> list[tuple[bytes, bytes]]:
    """The headers of the answer to a browser's question before the request itself."""
    return [
        *allowing(origin),
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-allow-headers", asked_headers or b"authorization, content-type"),
        (b"access-control-max-age", b"600"),
    ]


def is_loopback(host: str) -> bool:
    """True for an address or name to which only this machine can connect."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _host_name(host: str) -> str | None:
    """The name of NAME, NAME:PORT, [ADDRESS] or [ADDRESS]:PORT, in lower case."""
    if not host or any(c in host for c in "/\\@?# \t,"):
        return None
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    name = parts.hostname
    return None if not name else name.rstrip(".")


def _authority(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
