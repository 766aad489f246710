"""Several requests as one asynchronous stream, and streams whose engine has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest
from serving import engine, finish, request, tokens

from qwenkit.engine.service import EngineService
from qwenkit.errors import RequestError
from qwenkit.types.events import Event, FinishEvent

PATIENCE_S = 20.0


@pytest.fixture
def service() -> Iterator[EngineService]:
    with EngineService(engine()) as made:
        yield made


async def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.002)


def idle(service: EngineService) -> bool:
    status = service.engine.status()
    return (status.running, status.waiting) == (0, 0)


def test_what_is_there_together_comes_together(service: EngineService) -> None:
    requests = [request(name, name * 3, max_tokens=20, seed=1) for name in "abc"]
    alone = dict(zip("abc", service.generate(requests), strict=True))

    async def collect() -> dict[str, list[Event]]:
        events: dict[str, list[Event]] = {one.id: [] for one in requests}
        stream = service.astream_many(requests)
        await stream.accepted()
        batches = 0
        while batch := await stream.ready():
            batches += 1
            for event in batch:
                events[event.request_id].append(event)
            await asyncio.sleep(0.02)  # more than one step's worth comes meanwhile
        assert await stream.ready() == []
        assert batches < sum(map(len, events.values()))
        return events

    together = asyncio.run(collect())
    assert {name: tokens(events) for name, events in together.items()} == {
        name: tokens(events) for name, events in alone.items()
    }
    assert all(finish(events).reason in ("length", "stop") for events in together.values())


def test_one_that_is_refused_submits_none(service: EngineService) -> None:
    good, constrained = request("a"), request("b", constraint={"choice": ["yes"]})

    async def ask() -> None:
        for bad in (request("c", []), request("c", constraint={"regex": "("})):
            with pytest.raises(RequestError):
                await service.astream_many([good, constrained, bad]).ready()
        stream = service.astream_many([good, constrained])
        await stream.accepted()
        await stream.accepted()
        ends = [e for e in [e async for e in stream] if isinstance(e, FinishEvent)]
        assert {end.request_id for end in ends} == {"a", "b"}

    asyncio.run(ask())


def test_aborting_ends_all_of_them(service: EngineService) -> None:
    async def ask() -> None:
        stream = service.astream_many(
            [request(name, max_tokens=200, ignore_eos=True) for name in "abc"]
        )
        assert await stream.ready()
        stream.abort()
        assert await stream.ready() == []
        await until(lambda: idle(service))
        waiting = service.astream_many([request("d", max_tokens=200, ignore_eos=True)])
        task = asyncio.create_task(_last(waiting))
        await until(lambda: not idle(service))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: idle(service))

    asyncio.run(ask())


async def _last(stream: object) -> None:
    async for _ in stream:  # type: ignore[attr-defined]
        pass


def test_a_stream_can_be_ended_from_outside(service: EngineService) -> None:
    async def ask() -> None:
        stream = service.astream_many(
            [request(name, max_tokens=200, ignore_eos=True) for name in "ab"]
        )
        await stream.ready()
        stream.fail("enough")
        events = []
        while batch := await stream.ready():
            events += batch
        ends = [event for event in events if isinstance(event, FinishEvent)]
        assert sorted((end.request_id, end.reason, end.error) for end in ends) == [
            *(("a", "error", "enough"), ("b", "error", "enough"))
        ]
        assert events[-1] is ends[-1]  # and nothing follows, though the engine says more
        await until(lambda: idle(service))

    asyncio.run(ask())


def test_whether_the_engine_lives_is_told() -> None:
    service = EngineService(engine())
    assert service.is_alive
    service.close()
    assert not service.is_alive
