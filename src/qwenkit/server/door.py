"""Where a server listens: what can be known to be wrong with it before a model is loaded."""

from __future__ import annotations

import socket

from qwenkit.errors import UsageError
from qwenkit.server.hosts import is_loopback
from qwenkit.server.settings import Access

BACKLOG = 1024


def check_access(host: str, access: Access, *, no_auth: bool) -> None:
    """Raises UsageError for an address beyond this machine with nothing that keeps others out."""
    if access.is_open and not no_auth and not is_loopback(host):
        raise UsageError(
            f"--host {host}: others could use this server. Give --api-key, or --no-auth if that is "
            "meant."
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one. Raises UsageError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host.strip("[]"), port))
        listening.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listening.close()
        raise UsageError(f"--host {host} --port {port}: {error}.") from error
    return listening
