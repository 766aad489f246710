"""Places for answers, shared between clients; clients that leave; the end of engine and server."""

from __future__ import annotations

import asyncio
import ctypes
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import HELLO, Client, asked, data_of

from qwenkit.server.errors import ApiError
from qwenkit.server.served import SHUTTING_DOWN
from qwenkit.server.settings import Access, ServerSettings

PATIENCE_S = 20.0
LONG = {"messages": HELLO, "max_tokens": 4000, "ignore_eos": True}
HOST = ("host", "127.0.0.1:8000")


async def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.005)


def free(client: Client) -> bool:
    """Nothing runs, nothing waits, every block is back."""
    status = client.served.llm.status()
    idle = (status.running, status.waiting, client.served.requests) == (0, 0, 0)
    return idle and status.free_blocks == status.total_blocks


def test_places_are_bounded_and_one_client_does_not_take_them_all(tiny: Path) -> None:
    async def use(client: Client) -> None:
        served = client.served
        with served.admitted("a", 8):
            with pytest.raises(ApiError) as caught, served.admitted("a", 1):
                pass
            assert (caught.value.status, caught.value.headers["retry-after"]) == (429, "1")
            with served.admitted("b", 2):
                with pytest.raises(ApiError), served.admitted("b", 1):  # its share of two
                    pass
                with served.admitted("c", 1), pytest.raises(ApiError), served.admitted("c", 1):
                    pass
            with pytest.raises(ApiError), served.admitted("b", 5):
                pass
        with served.admitted("b", 8):
            assert served.requests == 8
        assert served.requests == 0
        never = await client.chat(n=9)
        assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
        with served.admitted("b", 8):
            refused = await client.chat(n=5)
            kind = refused.json()["error"]["type"]
            assert (refused.status_code, kind) == (429, "rate_limit_error")
            assert refused.headers["retry-after"] == "1"

    asked(tiny, use, ServerSettings(names=("tiny",), max_requests=8))


def test_one_client_has_few_threads_at_a_time(tiny: Path) -> None:
    async def use(client: Client) -> None:
        running, most = 0, 0
        gate = asyncio.Event()
        loop = asyncio.get_running_loop()

        def work() -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
            running -= 1

        greedy = [asyncio.create_task(client.served.in_thread("a", work)) for _ in range(6)]
        await until(lambda: running == 2)
        assert await client.served.in_thread("b", lambda: "at once") == "at once"
        gate.set()
        await asyncio.gather(*greedy)
        assert most == 2
        assert client.served._turns == {}

    asked(tiny, use)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_everything(tiny: Path, stream: bool) -> None:
    async def use(client: Client) -> None:
        for n in (1, 3):
            for after_s in (0.0, 0.02, 0.1):
                body = json.dumps({**LONG, "stream": stream, "n": n}).encode()
                asking = asyncio.create_task(leave(client, body, after_s))
                await asking
                await until(lambda: free(client))
        assert len(asyncio.all_tasks()) <= 2  # this one, and the look after the engine

    asked(tiny, use)


async def leave(client: Client, body: bytes, after_s: float) -> None:
    """Ask, and be gone after so long."""
    left = asyncio.Event()
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if left.is_set():
            raise OSError("the connection is gone")

    asyncio.get_running_loop().call_later(after_s, left.set)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 1),
    }
    await client.app(scope, receive, send)


def test_silent_streams_are_kept_alive(tiny: Path) -> None:
    async def use(client: Client) -> None:
        hold = asyncio.Event()
        original = client.served.submit

        async def submit(*given: Any) -> Any:
            stream = await original(*given)
            ready = stream.ready

            async def late() -> Any:
                await hold.wait()
                return await ready()

            stream.ready = late  # type: ignore[method-assign]
            return stream

        client.served.submit = submit  # type: ignore[method-assign]
        asyncio.get_running_loop().call_later(0.25, hold.set)
        answer = await client.chat(stream=True)
        assert answer.text.count(": keep-alive\n\n") >= 2
        assert data_of(answer.text)[-1] == "[DONE]"

    asked(tiny, use, ServerSettings(names=("tiny",), keep_alive_s=0.05))


def kill(client: Client) -> None:
    """End the engine's thread in the middle of its work, as a fault of the interpreter would."""
    thread = client.served.llm._service._worker._thread
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("speechless", [False, True])
def test_a_dead_engine_ends_every_stream_with_an_error(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, speechless: bool
) -> None:
    async def use(client: Client) -> None:
        worker = client.served.llm._service._worker
        if speechless:  # it cannot even say that it ended
            monkeypatch.setattr(worker, "_shut", lambda *given: None)
        path = "/v1/chat/completions"
        streaming = [client.post(path, {**LONG, "stream": True}) for _ in range(4)]
        streams = [asyncio.create_task(one) for one in streaming]
        wholes = [asyncio.create_task(client.post(path, LONG)) for _ in range(2)]
        await until(lambda: client.served.llm.status().running == 6)
        kill(client)
        await until(lambda: not worker.is_alive)
        start_s = time.monotonic()
        for answer in await asyncio.gather(*streams):
            *before, last = data_of(answer.text)
            assert last["error"]["type"] == "server_error"
            assert all("error" not in chunk for chunk in before)
        for answer in await asyncio.gather(*wholes):
            assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert time.monotonic() - start_s < 2
        for path in ("/health", "/ready"):
            answer = await client.http.get(path)
            assert (answer.status_code, answer.json()) == (503, {"status": "dead"})
        after = await client.chat()
        assert after.status_code == 503
        assert client.served.requests == 0

    asked(tiny, use)


@pytest.mark.parametrize("stream", [False, True])
def test_a_step_that_does_not_end_ends_every_stream(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    async def use(client: Client) -> None:
        release = threading.Event()
        worker = client.served.llm._service._worker
        original = worker.engine.step

        def stuck() -> Any:
            release.wait()
            return original()

        monkeypatch.setattr(worker.engine, "step", stuck)
        try:
            answer = await client.post("/v1/chat/completions", {**LONG, "stream": stream})
            error = data_of(answer.text)[-1]["error"] if stream else answer.json()["error"]
            assert "does not end" in error["message"]
            for path in ("/health", "/ready"):
                answer = await client.http.get(path)
                assert (answer.status_code, answer.json()) == (503, {"status": "stuck"})
            refused = await client.chat()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_stuck")
        finally:
            release.set()
        await until(lambda: free(client))
        assert (await client.http.get("/health")).json() == {"status": "ok"}
        assert (await client.chat()).status_code == 200

    asked(tiny, use, ServerSettings(names=("tiny",), step_s=1.5))


def test_while_draining_nothing_new_is_taken_and_what_runs_may_end(tiny: Path) -> None:
    async def use(client: Client) -> None:
        running = asyncio.create_task(client.chat(max_tokens=60, ignore_eos=True))
        await until(lambda: client.served.llm.status().running == 1)
        client.served.draining = True
        refused = await client.chat()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert (await client.http.get("/health")).status_code == 200
        ready = await client.http.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert (await running).json()["usage"]["completion_tokens"] == 60
        client.served.draining = False
        late = asyncio.create_task(client.post("/v1/chat/completions", {**LONG, "stream": True}))
        await until(lambda: client.served.llm.status().running == 1)
        client.served.end_all(SHUTTING_DOWN)
        assert data_of((await late).text)[-1]["error"]["code"] == "shutting_down"
        await until(lambda: free(client))  # the engine does not go on with it

    asked(tiny, use)


def test_a_client_is_a_key_and_a_user(tiny: Path) -> None:
    settings = ServerSettings(names=("tiny",), access=Access(api_keys=("k",)))

    async def use(client: Client) -> None:
        seen: list[str] = []
        original = client.served.submit

        async def submit(who: str, requests: Any) -> Any:
            seen.extend(request.options.client for request in requests)
            return await original(who, requests)

        client.served.submit = submit  # type: ignore[method-assign]
        for fields in ({}, {"user": "u"}, {"safety_identifier": "v"}):
            headers = {"authorization": "Bearer k"}
            body = {"messages": HELLO, "max_tokens": 1, **fields}
            await client.post("/v1/chat/completions", body, headers=headers)
        key = seen[0]
        assert key
        assert seen == [key, f"{key}/u", f"{key}/v"]

    asked(tiny, use, settings)
