"""Constraints through the engine's thread: compiled in the caller's, never in the event loop's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from serving import engine, finish, request, text

from qwenkit.engine import constrain
from qwenkit.engine.service import EngineService
from qwenkit.errors import RequestError
from qwenkit.types.events import Event, FinishEvent

PATIENCE_S = 60.0  # a guard against hanging, not a measure


@pytest.fixture
def service() -> Iterator[EngineService]:
    with EngineService(engine()) as service:
        yield service


class Held:
    """Compilation that waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.free = threading.Event(), threading.Event()
        compiled = constrain._compile

        def wait(*given: Any) -> Any:
            self.reached.set()
            assert self.free.wait(PATIENCE_S)
            return compiled(*given)

        monkeypatch.setattr(constrain, "COMPILE_TIMEOUT_S", PATIENCE_S)
        monkeypatch.setattr(constrain, "_compile", wait)


async def collect(service: EngineService, one: Any) -> list[Event]:
    return [event async for event in service.astream(one)]


def test_several_together_as_from_the_engine_itself(service: EngineService) -> None:
    requests = [
        request(f"{i}", constraint={"regex": f"[a-c]{{3}}{i}"}, seed=i, temperature=1)
        for i in range(6)
    ]
    outputs = [text(events) for events in service.generate(requests)]
    assert [output[3:] for output in outputs] == list("012345")

    async def together() -> list[list[Event]]:
        return await asyncio.gather(*(collect(service, one) for one in requests))

    assert [text(events) for events in asyncio.run(together())] == outputs


def test_one_refused_constraint_submits_none(service: EngineService) -> None:
    good, bad = request("a"), request("b", constraint={"regex": "("})
    with pytest.raises(RequestError, match=r"constraint\.regex"):
        service.stream_many([good, bad])
    assert finish(service.generate([good])[0]).reason in ("stop", "length")

    async def ask() -> None:
        stream = service.astream(bad)
        with pytest.raises(RequestError, match=r"constraint\.regex"):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        with pytest.raises(RequestError, match="ignore_eos"):  # known without compiling
            service.astream(request("c", constraint={"regex": "a"}, ignore_eos=True))

    asyncio.run(ask())


def test_others_are_served_while_one_compiles(
    service: EngineService, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)

    async def both() -> None:
        slow = asyncio.create_task(collect(service, request("a", constraint={"choice": ["yes"]})))
        assert await asyncio.to_thread(held.reached.wait, PATIENCE_S)
        free = await collect(service, request("b", max_tokens=5))
        assert isinstance(free[-1], FinishEvent)
        assert not slow.done()
        held.free.set()
        assert text(await slow) == "yes"

    asyncio.run(both())


def test_a_request_that_is_given_up_while_it_compiles_is_never_submitted(
    service: EngineService, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)

    async def give_up() -> None:
        stream = service.astream(request("a", constraint={"choice": ["yes"]}))
        waiting = asyncio.create_task(stream.__anext__())
        assert await asyncio.to_thread(held.reached.wait, PATIENCE_S)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        held.free.set()
        again = await collect(service, request("a", max_tokens=3))  # the id is free
        assert isinstance(again[-1], FinishEvent)

    asyncio.run(give_up())


def test_closing_a_stream_that_compiles_cancels_nobody_who_waits_for_it(
    service: EngineService, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)

    async def close() -> None:
        stream = service.astream(request("a", constraint={"choice": ["yes"]}))

        async def read() -> list[Event]:
            return [event async for event in stream]

        waiting = asyncio.create_task(read())
        assert await asyncio.to_thread(held.reached.wait, PATIENCE_S)
        await stream.aclose()
        assert await waiting == []
        held.free.set()

    asyncio.run(close())


def test_a_stream_that_is_closed_before_it_is_read_ends_its_compilation(
    service: EngineService,
) -> None:
    async def close() -> None:
        stream = service.astream(request("a", constraint={"choice": ["yes"]}))
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(close())
    assert text(service.generate([request("a", constraint={"choice": ["no"]})])[0]) == "no"
