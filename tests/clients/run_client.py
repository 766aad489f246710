"""Runs what docs/clients.md shows of one client, then the checks of its answers. Started with the
Python of that client's environment: `run_client.py HEADING CHECKS http://… DIALECT`.

Any connection to something other than this machine, tried in Python, is reported and fails the run.
"""

from __future__ import annotations

import atexit
import os
import re
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "clients.md"
SHOWN_URL = "http://127.0.0.1:8000"
THIS_MACHINE = ("127.0.0.1", "localhost", "::1", None)

reached_for: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: names are looked up and sockets connected on this machine only."""
    host: object = None
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    if isinstance(host, bytes):
        host = host.decode()
    if host not in THIS_MACHINE:
        reached_for.append(str(host))
        raise ConnectionRefusedError(f"a client reached for {host}")


def report() -> None:
    """The last thing that runs, after what the libraries do when a program ends."""
    if reached_for:
        sys.stderr.write(f"reached for {', '.join(sorted(set(reached_for)))}\n")
        sys.stderr.flush()
        os._exit(3)


def shown_program(heading: str, url: str) -> str:
    """The Python under one heading of the page, with the address of the server under test."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = (part for part in sections if part.startswith(f"{heading}\n"))
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return "\n".join(blocks).replace(SHOWN_URL, url)


def main(heading: str, checks: str, url: str, dialect: str) -> None:
    sys.addaudithook(watch)
    atexit.register(report)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "shown.py"  # a file, because smolagents reads its own source
        program.write_text(shown_program(heading, url), encoding="utf-8")
        shown = runpy.run_path(str(program))
        check = runpy.run_path(str(HERE / "checks" / f"{checks}.py"))["check"]
        check(shown | {"dialect": dialect}, url)
    sys.stdout.write(f"{heading}: passed\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
