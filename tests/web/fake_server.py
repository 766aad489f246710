"""An OpenAI-compatible server that says what it is told to: for tests of the chat page."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Script:
    """One reply: `pieces` of text, `pause_s` apart, after `thoughts`; then calls of tools.

    `cuts_off` breaks the connection after the pieces; `status` refuses instead of answering.
    """

    pieces: list[str] = field(default_factory=lambda: ["Hello", " there."])
    thoughts: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    pause_s: float = 0.0
    finish: str = "stop"
    usage: dict[str, Any] | None = None
    status: int = 200
    message: str = "refused"
    cuts_off: bool = False


class ScriptedServer:
    """Answers on a loopback port. `requests` holds every body that came; `hung_up` counts replies
    whose reader left; without a script left it echoes the last message.
    """

    def __init__(self, models: tuple[str, ...] = ("toy-1", "toy-2")) -> None:
        self.scripts: list[Script] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.hung_up = 0
        self.models = models
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(200, {"data": [{"id": m, "object": "model"} for m in server.models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.requests.append(body)
                server.headers.append(dict(self.headers))
                script = server.scripts.pop(0) if server.scripts else None
                if script is None:
                    script = Script([str(body["messages"][-1]["content"])])
                if script.status != 200:
                    self.answer(script.status, {"error": {"message": script.message}})
                else:
                    self.stream(body, script)

            def answer(self, status: int, value: Any) -> None:
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def stream(self, body: dict[str, Any], script: Script) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("connection", "close")
                self.end_headers()
                self.close_connection = True
                try:
                    for event in events(body, script):
                        self.wfile.write(f"data: {event}\n\n".encode())
                        self.wfile.flush()
                        time.sleep(script.pause_s)
                except OSError:
                    server.hung_up += 1

        return Handler


def events(body: dict[str, Any], script: Script) -> Iterator[str]:
    """The events of one reply."""

    def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return json.dumps({"id": "x", "model": body["model"], "choices": [choice]})

    if script.thoughts:
        yield chunk({"reasoning_content": script.thoughts})
    for piece in script.pieces:
        yield chunk({"content": piece})
    if script.cuts_off:
        raise OSError
    for index, (name, arguments) in enumerate(script.calls):
        head = {"index": index, "id": f"call-{index}", "type": "function"}
        yield chunk({"tool_calls": [{**head, "function": {"name": name, "arguments": ""}}]})
        for start in range(0, len(arguments), 1000):
            part = {"arguments": arguments[start : start + 1000]}
            yield chunk({"tool_calls": [{"index": index, "function": part}]})
    yield chunk({}, script.finish)
    if script.usage is not None:
        yield json.dumps({"id": "x", "model": body["model"], "choices": [], "usage": script.usage})
    yield "[DONE]"
