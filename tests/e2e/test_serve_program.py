"""`qwenkit serve` as a process: it listens, bounds what comes over a socket, and ends well."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from conftest import HANG_S, PROGRAM
from tiny import write_tiny_checkpoint

LONG = {
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 3000,
    "ignore_eos": True,
    "stream": True,
}


class Server:
    """A running server; `port` is where."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said: list[str] = []
        assert process.stderr is not None
        for line in process.stderr:
            self.said.append(line)
            found = re.search(r"answers at http://127\.0\.0\.1:(\d+)/v1", line)
            if found:
                self.port = int(found[1])
                return
        raise AssertionError("".join(self.said))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=HANG_S)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=HANG_S) as it:
            return json.load(it)

    def status(self, path: str) -> int:
        try:
            self.get(path)
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    def ask(self, body: dict[str, Any]) -> socket.socket:
        """Send a request for a chat; the socket that its answer comes from."""
        data = json.dumps(body).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        connection = self.connect()
        connection.sendall(head.encode() + data)
        return connection

    def wait(self) -> tuple[int, str]:
        """Its exit code, and all that it said."""
        _, rest = self.process.communicate(timeout=HANG_S)
        return self.process.returncode, "".join(self.said) + rest


def read_all(connection: socket.socket) -> bytes:
    data = b""
    with suppress(ConnectionResetError), connection:
        while piece := connection.recv(65536):
            data += piece
    return data


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Server]]:
    folder = write_tiny_checkpoint(
        tmp_path / "tiny", config={"max_position_embeddings": 4096, "hidden_size": 128}
    )
    running: list[subprocess.Popen[str]] = []

    def run(*options: str) -> Server:
        process = subprocess.Popen(
            [*PROGRAM, "serve", str(folder), "--port", "0", "--threads", "1", *options],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        running.append(process)
        return Server(process)

    yield run
    for process in running:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_it_drains_on_sigterm_and_ends_late_answers_with_an_error(
    start: Callable[..., Server],
) -> None:
    server = start("--drain-seconds", "2")
    assert server.get("/ready") == {"status": "ready"}
    assert server.get("/v1/models")["data"][0]["id"] == "tiny"
    short, late = server.ask({**LONG, "max_tokens": 300}), server.ask({**LONG, "n": 2})
    for connection in (short, late):
        assert b"data: " in connection.recv(65536) + connection.recv(65536)
    server.process.send_signal(signal.SIGTERM)
    deadline_s = time.monotonic() + HANG_S
    states: set[int] = set()
    while 503 not in states:  # whoever asks is told, for as long as something runs
        states.add(server.status("/ready"))
        assert time.monotonic() < deadline_s
    assert states <= {200, 503}
    assert b"shutting_down" in read_all(server.ask(LONG))
    assert b"data: [DONE]" in read_all(short)
    rest = read_all(late)
    assert b"shutting down" in rest or b"data: [DONE]" in rest  # a fast machine gets done in time
    code, said = server.wait()
    assert code == 0, said
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert {"draining", "request"} <= {line["message"] for line in lines}
    assert "Hello" not in said
    assert "Traceback" not in said


def test_what_no_application_ever_sees_is_bounded(start: Callable[..., Server]) -> None:
    server = start()
    cases = [
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000, b" 431 "),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000, b" 431 "),
        (b"nonsense\r\n\r\n", b" 400 "),
        (b"GET /v1/models HTTP/1.1\r\n\r\n", b" 400 "),  # no host
        (b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n", b" 421 "),
        (b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n", b" 400 "),
        (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: 1000000000\r\nExpect: 100-continue\r\n\r\n",
            b" 413 ",
        ),
    ]
    for data, status in cases:
        connection = server.connect()
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent
            connection.sendall(data)
        answer = b""
        with suppress(ConnectionResetError), connection:
            while b'"error"' not in answer and (piece := connection.recv(65536)):
                answer += piece
        first = answer.split(b"\r\n")[0]
        assert status in first, (data[:60], answer[:200])
        assert b'"error"' in answer
    assert server.get("/health") == {"status": "ok"}
    check_that_hanging_up_frees_blocks(server)
    server.process.send_signal(signal.SIGINT)
    assert server.wait()[0] == 0


def check_that_hanging_up_frees_blocks(server: Server) -> None:
    def engine() -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        pairs = [line.split() for line in lines if line.startswith("qwenkit_engine_")]
        return {name: float(value) for name, value in pairs}

    hung_up = [server.ask({**LONG, "n": 2}) for _ in range(6)]
    for number, connection in enumerate(hung_up):
        if number % 2:
            connection.recv(1000)
        if number % 3 == 0:  # with a reset instead of a goodbye
            linger = b"\1\0\0\0\0\0\0\0"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
    deadline_s = time.monotonic() + 10
    while (now := engine())["qwenkit_engine_running"] + now["qwenkit_engine_waiting"]:
        assert time.monotonic() < deadline_s, now
        time.sleep(0.05)
    assert now["qwenkit_engine_free_blocks"] == now["qwenkit_engine_total_blocks"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "0.0.0.0"), "--api-key, or --no-auth"),
        (("--host", "127.0.0.1", "--server-name", "127.0.0.2"), "give one"),
        (("--api-auth", "nobody"), "USER:PASS"),
        (("--api-key", "k", "--no-auth"), "drop one"),
        (("--api-key", " "), "--api-key"),
        (("--port", "70000"), "--port"),
        (("--adapter", "a=x", "--adapter", "a=y"), "twice"),
        (("--host", "203.0.113.7", "--no-auth"), "--host 203.0.113.7"),
        (("--cpu-only", "--device", "cuda"), "--cpu-only"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(
    run_program: Callable[..., subprocess.CompletedProcess[str]],
    options: tuple[str, ...],
    words: str,
) -> None:
    done = run_program("serve", "no/such-model", "--offline", *options)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
