"""Real processes of the program: run to the end, or driven through a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAM = (sys.executable, "-m", "qwenkit")
HANG_S = 60.0  # a guard against hanging, not a measure of speed
_CONTROL_SEQUENCE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[=>78])|\r")


class Terminal:
    """A program in a terminal of 100 columns; `expect` reads on until a pattern has appeared."""

    def __init__(self, args: tuple[str, ...], environment: dict[str, str]) -> None:
        self._side, program_side = pty.openpty()
        fcntl.ioctl(program_side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen(
            [*PROGRAM, *args],
            stdin=program_side,
            stdout=program_side,
            stderr=program_side,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )
        os.close(program_side)
        self._raw = b""
        self._read_to = 0

    @property
    def text(self) -> str:
        """All that was shown, without control sequences."""
        return _CONTROL_SEQUENCE.sub("", self._raw.decode("utf-8", errors="ignore"))

    def expect(self, pattern: str) -> str:
        """Wait for `pattern` in what has appeared since the last match; return what it matched."""
        deadline_s = time.monotonic() + HANG_S
        while True:
            found = re.compile(pattern, re.DOTALL).search(self.text, self._read_to)
            if found:
                self._read_to = found.end()
                return found.group()
            if not self._read(deadline_s - time.monotonic()):
                raise AssertionError(f"{pattern!r} never came after:\n{self.text}")

    def send(self, keys: str) -> None:
        """Press keys: "\\r" is Enter, "\\x03" Ctrl-C, "\\x04" Ctrl-D."""
        os.write(self._side, keys.encode())

    def wait(self) -> int:
        """Read to the end; return the exit code."""
        deadline_s = time.monotonic() + HANG_S
        while self._read(deadline_s - time.monotonic()):
            pass
        return self.process.wait(timeout=HANG_S)

    def close(self) -> None:
        """End the program if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._side)

    def _read(self, timeout_s: float) -> bool:
        """Take what is there; False at the end of the output, or when nothing came in time."""
        ready, _, _ = select.select([self._side], [], [], max(timeout_s, 0))
        if not ready:
            return False
        try:
            data = os.read(self._side, 65536)
        except OSError:  # Linux reports the end of a terminal as EIO
            return False
        self._raw += data
        return bool(data)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The surroundings of a program under test: a plain terminal, its own state folder."""
    return {
        **os.environ,
        "TERM": "xterm",
        "PYTHONUTF8": "1",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # our terminal does not answer where its cursor is
        "XDG_STATE_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "2",
    }


@pytest.fixture
def open_terminal(environment: dict[str, str]) -> Iterator[Callable[..., Terminal]]:
    """Starts the program in a terminal; it is ended with the test."""
    opened: list[Terminal] = []

    def start(*args: str) -> Terminal:
        opened.append(Terminal(args, environment))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


@pytest.fixture
def run_program(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the program to its end, with `stdin` as its standard input."""

    def run(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PROGRAM, *args],
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            env=environment,
            timeout=HANG_S,
            check=False,
        )

    return run
