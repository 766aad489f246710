"""Programs of ours that run beside one another: a server for a page, a page for a server.

A key goes through the child's environment: the arguments of a program can be read by every user
of the machine.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from qwenkit.errors import MissingDependencyError, QwenkitError

KEY_VARIABLE = "QWENKIT_API_KEY"
_POLL_S = 0.25
_LEAVE_S = 35.0  # a server lets running answers end


def check_page() -> None:
    """Raises MissingDependencyError where what the page needs is not installed."""
    for package in ("gradio", "openai"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "web", "The chat page")


def start_page(url: str, *, api_key: str | None = None, port: int | None = None) -> Child:
    """`qwenkit web` for the server at `url` (it ends in /v1), listening on this machine only.

    It says on standard error where it is. Raises MissingDependencyError before anything is started.
    """
    check_page()
    options = ["--url", url] + ([] if port is None else ["--server-port", str(port)])
    return _start("web", options, api_key)


def start_server(model: str, *, api_key: str, port: int, cpu_only: bool = False) -> Child:
    """`qwenkit serve` for `model` on this machine's `port`."""
    options = [model, "--host", "127.0.0.1", "--port", str(port)]
    return _start("serve", options + (["--cpu-only"] if cpu_only else []), api_key)


Child = subprocess.Popen[bytes]


def _start(command: str, options: Sequence[str], api_key: str | None) -> Child:
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    if api_key:
        environment[KEY_VARIABLE] = api_key
    program = [sys.executable, "-m", "qwenkit", command, *options]
    return subprocess.Popen(program, env=environment, stdin=subprocess.DEVNULL)


@contextmanager
def ending(child: Child) -> Iterator[Child]:
    """End `child` on the way out, first kindly."""
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_until_ready(child: Child, url: str, *, api_key: str) -> None:
    """Wait until the server that `child` is answers at `url`. Raises QwenkitError if it ends."""
    request = urllib.request.Request(
        f"{url}/models", headers={"Authorization": f"Bearer {api_key}"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while child.poll() is None:
        try:
            with direct.open(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(_POLL_S)
    raise QwenkitError(
        f"The server ended with status {child.returncode} before it was ready; its words are above."
    )


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
