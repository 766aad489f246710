"""An engine in a process of its own, spoken to in lines of JSON; see `bench.peers.__main__`.

The process may run in an environment without qwenkit: a folder with nothing but a link to this
package is put before its own modules.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qwenkit.bench.environments import launch_prefix
from qwenkit.bench.peers.spec import Load, Options, Work
from qwenkit.errors import QwenkitError

_PACKAGE = Path(__file__).parents[1]
_START = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from qwenkit.bench.peers.__main__ import main; main()"
)


@dataclass(frozen=True, slots=True)
class Launch:
    """What is started: an engine's name, its Python, the model it reads, its options."""

    engine: str
    python: str
    model: Path
    options: Options

    def command(self, link_folder: str, *more: str) -> list[str]:
        """The command line; `link_folder` holds the link to the package."""
        options = json.dumps(self.options.to_json())
        command = [*launch_prefix(self.engine, self.options.threads), self.python, "-c", _START]
        return [*command, link_folder, self.engine, str(self.model), "--options", options, *more]


class _Link:
    """A folder whose only content is a link to this package."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="qwenkit-bench-")
        self.path = self._folder.name
        (Path(self.path) / _PACKAGE.name).symlink_to(_PACKAGE, target_is_directory=True)

    def close(self) -> None:
        self._folder.cleanup()


def prepare_files(launch: Launch, target: Path) -> None:
    """Let the engine write its own files of the model into `target`.

    Raises QwenkitError with its last words when it cannot.
    """
    link = _Link()
    command = launch.command(link.path, "--prepare", str(target))
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise _cannot_start(launch, error) from error
    finally:
        link.close()
    if done.returncode:
        raise QwenkitError(f"{launch.engine}: {_last_words(done.stderr, done.returncode)}")


def run_worker(what: str, module: str, argument: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Run one of this package's modules with this Python; the last line of JSON that it writes.
    `say` is called with the "progress" of those before. Raises QwenkitError, `what` and the last
    words, when it fails.
    """
    command = [sys.executable, "-m", module, argument]
    answer: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as messages:  # a pipe that nobody reads would fill up
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=messages,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    answer = json.loads(line)
                    if "progress" in answer:
                        say(answer["progress"])
            except BaseException:
                kill_session(process)
                raise
        messages.seek(0)
        if process.returncode:
            raise QwenkitError(f"{what}: {_last_words(messages.read(), process.returncode)}")
    return answer


def run_program(command: Sequence[str], *, cwd: Path, timeout_s: float) -> str:
    """Run a program to its end; what it wrote. Raises QwenkitError when it cannot start or does not
    end in time.
    """
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except OSError as error:
        raise QwenkitError(f"cannot start {command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise QwenkitError(f"{command[0]} did not end within {timeout_s:g} s") from error
    return done.stdout


def kill_session(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a session, and all that it started there, whether it still runs."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class WorkerProcess:
    """A running engine. Raises QwenkitError when it cannot start or stops answering."""

    def __init__(self, launch: Launch) -> None:
        self._engine = launch.engine
        self._link = _Link()
        # A file: a pipe that nobody reads would fill up. It is closed where the process ends.
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                launch.command(self._link.path),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._messages,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            self._messages.close()
            self._link.close()
            raise _cannot_start(launch, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        kill_session(self._process)
        with suppress(BrokenPipeError):  # a request that a dead process never took
            self._process.communicate()
        self._messages.close()
        self._link.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def hello(self) -> tuple[str, str]:
        """Its version and how it holds the weights: its first line, once the model is loaded."""
        message = self._read()
        return str(message["version"]), str(message.get("setting", ""))

    def measure(self, work: Work | Load) -> dict[str, Any]:
        """One measurement: {"seconds": …, "peak_bytes": …}, of a load "times" in place of seconds,
        as `peers.spec.Server.play` gives them.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died: reading says why
            self._process.stdin.write(json.dumps(work.to_json()) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                message: dict[str, Any] = json.loads(line)
                return message
        status = self._process.wait()
        self._messages.seek(0)
        raise QwenkitError(f"{self._engine}: {_last_words(self._messages.read(), status)}")


def _last_words(messages: str, status: int) -> str:
    lines = messages.strip().splitlines()
    return lines[-1] if lines else f"ended with status {status}"


def _cannot_start(launch: Launch, error: OSError) -> QwenkitError:
    return QwenkitError(f"{launch.engine}: cannot start {launch.python}: {error.strerror}")
