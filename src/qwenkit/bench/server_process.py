"""Our own server as a process: started, watched from outside, ended in every way there is."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from qwenkit.bench.http_client import Target, wait_until_ready
from qwenkit.bench.process import kill_session
from qwenkit.errors import QwenkitError

HOST = "127.0.0.1"
READY = "/ready"
_READY_WITHIN_S = 120.0  # on a busy machine
_POLL_S = 0.02
_FORGET_PEAK = "5"  # of clear_refs, proc(5)


def free_port() -> int:
    """A port on which nobody listens just now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def own_address() -> str:
    """This machine's address towards others; another one of loopback where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.2"


def own_command(model: Path | str, port: int, options: Sequence[str] = ()) -> list[str]:
    """The command line of `qwenkit serve` with this Python."""
    command = [sys.executable, "-m", "qwenkit", "serve", str(model)]
    return [*command, "--host", HOST, "--port", str(port), *options]


class ServerProcess:
    """A server that `command` runs. What it writes goes to a file, of which `log` gives the text.

    Use it as a context manager: at the end the process is killed if it still runs.
    """

    def __init__(self, command: Sequence[str], target: Target, *, is_full_disk: bool = False):
        self.target = target
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self._full = Path("/dev/full").open("w") if is_full_disk else None  # noqa: SIM115
        output = self._full or self._log
        self.started_s = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # its helpers end with it
            )
        except OSError as error:
            self._close_files()
            raise QwenkitError(f"cannot start {command[0]}: {error.strerror}") from error

    @classmethod
    def ours(
        cls, model: Path | str, *options: str, key: str | None = None, is_full_disk: bool = False
    ) -> Self:
        """`qwenkit serve` of a model on a free port, with `key` as its only API key."""
        port = free_port()
        keyed = () if key is None else ("--api-key", key)
        command = own_command(model, port, (*options, *keyed))
        return cls(command, Target(host=HOST, port=port, key=key), is_full_disk=is_full_disk)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self._close_files()

    def _close_files(self) -> None:
        for file in (self._log, self._full):
            if file is not None:
                with suppress(OSError):  # what is still in the buffer of a full disk
                    file.close()

    async def wait_until_ready(self, path: str = READY, within_s: float = _READY_WITHIN_S) -> float:
        """Seconds from the start of the process until it is ready to answer.

        Raises QwenkitError with its last words when it ends, or is not ready in time.
        """
        waiting = asyncio.create_task(wait_until_ready(self.target, path, within_s))
        while not waiting.done():
            if not self.is_alive:
                waiting.cancel()
                raise QwenkitError(f"the server ended with {self.status}: {self.last_words()}")
            await asyncio.wait([waiting], timeout=_POLL_S)
        waiting.result()
        return time.perf_counter() - self.started_s

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """False once it has ended, however."""
        return self._process.poll() is None

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def log(self) -> str:
        """All that it has written."""
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")

    def last_words(self) -> str:
        """The last line of the log that says something."""
        lines = [line for line in self.log().splitlines() if line.strip()]
        return lines[-1] if lines else "nothing was written"

    def send(self, number: signal.Signals) -> None:
        """A signal."""
        self._process.send_signal(number)

    def wait(self, within_s: float) -> int | None:
        """The exit status; None when it still runs then."""
        try:
            return self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """At once, with all processes that it started."""
        kill_session(self._process)
        self._process.wait()

    # -- what Linux says about it ---------------------------------------------------------------

    def resident_bytes(self) -> int:
        """Now."""
        return status_bytes(self.pid, "VmRSS")

    def anonymous_bytes(self) -> int:
        """Memory of its own, what was swapped out included."""
        return status_bytes(self.pid, "RssAnon") + status_bytes(self.pid, "VmSwap")

    def peak_bytes(self) -> int:
        """The most since `forget_peak`."""
        return status_bytes(self.pid, "VmHWM")

    def forget_peak(self) -> None:
        """Start the peak anew."""
        Path(f"/proc/{self.pid}/clear_refs").write_text(_FORGET_PEAK)

    def open_files(self) -> int:
        """File descriptors, sockets among them."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def threads(self) -> int:
        """Threads."""
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))


def status_bytes(pid: int | str, name: str) -> int:
    """A line of /proc/PID/status in bytes; 0 where it is missing: the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
