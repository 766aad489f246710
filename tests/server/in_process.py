"""The web application over the tiny model, asked without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from qwenkit.api import AsyncLLM
from qwenkit.server.app import guarded
from qwenkit.server.guard import Guard
from qwenkit.server.served import Served
from qwenkit.server.settings import ServerSettings

HELLO = [{"role": "user", "content": "Hello"}]


@dataclass
class Raw:
    """An answer to a request of exactly these bytes, which no client library has put right."""

    status: int
    headers: dict[str, str]
    body: bytes
    received: int  # how often the application asked for more of the body


class Client:
    """Sends requests to an application in this process. `served` is what it looks after."""

    def __init__(self, served: Served, app: Guard, http: httpx.AsyncClient) -> None:
        self.served = served
        self.app = app
        self.http = http

    async def raw(
        self,
        method: str,
        path: str,
        headers: list[tuple[str, str]] | None = None,
        pieces: Iterable[bytes] = (),
        *,
        pause_s: float = 0.0,
    ) -> Raw:
        """Send a request as it is. After the last of the pieces the client leaves."""
        waiting, received, sent = list(pieces), 0, bytearray()
        start: dict[str, Any] = {}
        done = asyncio.Event()

        async def receive() -> dict[str, Any]:
            nonlocal received
            await asyncio.sleep(pause_s)
            if not waiting:
                await done.wait()
                return {"type": "http.disconnect"}
            received += 1
            return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                sent.extend(message.get("body", b""))

        given = [("host", "127.0.0.1:8000")] if headers is None else headers
        if pieces and not any(name == "content-length" for name, _ in given):
            given = [*given, ("transfer-encoding", "chunked")]
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "http_version": "1.1",
            "headers": [(n.encode(), v.encode("latin-1")) for n, v in given],
            "client": ("127.0.0.1", 5000),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }
        await self.app(scope, receive, send)
        done.set()
        found = {n.decode(): v.decode("latin-1") for n, v in start["headers"]}
        return Raw(start["status"], found, bytes(sent), received)

    async def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        if isinstance(body, bytes | str):
            return await self.http.post(path, content=body, **more)
        return await self.http.post(path, json=body, **more)

    async def chat(self, messages: Any = None, **fields: Any) -> httpx.Response:
        body = {"messages": HELLO if messages is None else messages, "max_tokens": 8, **fields}
        return await self.post("/v1/chat/completions", body)

    async def events(self, path: str, body: Any) -> list[Any]:
        """The data of all events of a stream, parsed; [DONE] as it is."""
        answer = await self.post(path, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        return data_of(answer.text)


def data_of(text: str) -> list[Any]:
    """The data of server-sent events, parsed; [DONE] as it is."""
    assert text.endswith("\n\n")
    blocks = text.removesuffix("\n\n").split("\n\n")
    lines = [line for block in blocks for line in block.split("\n") if line.startswith("data: ")]
    data = [line.removeprefix("data: ") for line in lines]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


@asynccontextmanager
async def client_of(llm: AsyncLLM, settings: ServerSettings | None = None) -> AsyncIterator[Client]:
    served = Served(llm, settings or ServerSettings(names=("tiny",)))
    app = guarded(served)
    transport = httpx.ASGITransport(app=app, client=("127.0.0.1", 5000))
    async with (
        served.looked_after(),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http,
    ):
        yield Client(served, app, http)


def asked(
    folder: Path,
    use: Callable[[Client], Coroutine[Any, Any, Any]],
    settings: ServerSettings | None = None,
    **loading: Any,
) -> Any:
    """What `use` gives with a client of a server of the checkpoint in `folder`."""

    async def run() -> Any:
        loading.setdefault("kv_cache_tokens", 4096)
        async with (
            AsyncLLM(folder, threads=1, **loading) as llm,
            client_of(llm, settings) as client,
        ):
            return await use(client)

    return asyncio.run(run())
