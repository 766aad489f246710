"""The engine's thread: streams, coroutines, cancelling, faults, and a clean end."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fakes import EOS, ByteTokenizer, tiny_model
from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Request
from qwenkit.engine.service import EngineService
from qwenkit.engine.settings import EngineSettings
from qwenkit.errors import RequestError, UsageError
from qwenkit.layers.attention import AttentionContext
from qwenkit.types.events import Event, FinishEvent, TokenEvent
from qwenkit.types.sampling import SamplingParams

MODEL = tiny_model()
PATIENCE_S = 20.0  # a guard against hanging, not a measure


def engine(model: Any = MODEL, **settings: Any) -> Engine:
    return Engine(
        model,
        ByteTokenizer(),
        EngineSettings(
            **{"block_tokens": 4, "kv_cache_tokens": 4096, "prefix_cache": False, **settings}
        ),
        stop_token_ids=(EOS,),
        context_tokens=512,
    )


@pytest.fixture
def served() -> Engine:
    return engine()


@pytest.fixture
def service(served: Engine) -> Iterator[EngineService]:
    with EngineService(served) as service:
        yield service


def request(name: str, prompt: str = "prompt", **sampling: Any) -> Request:
    options = {"temperature": 0, "ignore_eos": True, "max_tokens": 12, **sampling}
    return Request(name, tuple(prompt.encode()), SamplingParams.from_mapping(options))


def endless(name: str) -> Request:
    return request(name, max_tokens=None)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.005)


def idle(service: EngineService) -> bool:
    """Nobody waits for events (which is known from submission on), and every block is free."""
    served = service._worker.engine
    status = served.status()
    free = status.free_blocks == status.total_blocks
    return not service._worker._sinks and not served.has_work and free


def reason(event: Event) -> str:
    assert isinstance(event, FinishEvent)
    return event.reason


def gate() -> tuple[Any, threading.Event]:
    """A model that waits in every step until the event is set."""
    opened = threading.Event()

    class Gated:
        config, dtype = MODEL.config, MODEL.dtype

        def __call__(self, ids: torch.Tensor, context: AttentionContext) -> torch.Tensor:
            assert opened.wait(PATIENCE_S)
            logits: torch.Tensor = MODEL(ids, context)
            return logits

    return Gated(), opened


def faulty(bad_prompt_token: int) -> Any:
    """A model that raises when it meets a token."""

    class Faulty:
        config, dtype = MODEL.config, MODEL.dtype

        def __call__(self, ids: torch.Tensor, context: AttentionContext) -> torch.Tensor:
            if bad_prompt_token in ids:
                raise RuntimeError("the machine is on fire")
            logits: torch.Tensor = MODEL(ids, context)
            return logits

    return Faulty()


def test_a_stream_gives_tokens_and_one_finish(service: EngineService) -> None:
    events = list(service.stream(request("a")))
    assert [type(event) for event in events] == [TokenEvent] * 12 + [FinishEvent]
    assert reason(events[-1]) == "length"
    stream = service.stream(request("a"))  # the id is free again
    assert list(stream) == events
    assert next(stream, None) is None


def test_many_requests_run_together_and_come_back_in_order(service: EngineService) -> None:
    requests = [request(str(i), f"prompt {i}", max_tokens=3 + i) for i in range(9)]
    results = service.generate(requests)
    assert [events[-1].request_id for events in results] == [str(i) for i in range(9)]
    assert [len(events) - 1 for events in results] == list(range(3, 12))
    assert results == [list(service.stream(one)) for one in requests]
    assert service.generate([]) == []
    mixed = list(service.stream_many(requests[:3]))
    assert [event.request_id for event in mixed[:3]] == ["0", "1", "2"]
    assert sum(isinstance(event, FinishEvent) for event in mixed) == 3


def test_wrong_requests_are_refused_before_anything_runs(
    service: EngineService, served: Engine
) -> None:
    with pytest.raises(RequestError, match="empty"):
        service.stream(request("a", ""))
    with pytest.raises(RequestError, match="empty"):
        service.generate([request("a"), request("b", "")])
    with pytest.raises(RequestError, match="'a' is already being served"):
        service.generate([request("a"), request("a")])
    with service.stream(endless("c")), pytest.raises(RequestError, match="already being served"):
        service.stream(request("c"))
    until(lambda: idle(service))
    assert served.status().computed_tokens < 1000


@pytest.mark.parametrize("leave", ["close", "with", "drop", "break"])
def test_leaving_a_stream_aborts_its_request(service: EngineService, leave: str) -> None:
    stream = service.stream(endless("a"))
    next(stream)
    if leave == "close":
        stream.close()
        assert list(stream) == []
        stream.close()
    elif leave == "with":
        with stream:
            next(stream)
    elif leave == "drop":
        del stream
    else:
        for _ in stream:
            break
        del stream
    until(lambda: idle(service))


def test_interrupting_who_waits_aborts_whoever_keeps_the_traceback() -> None:
    """As after Ctrl-C in a notebook, which keeps the last traceback, and so the stream."""
    model, opened = gate()
    with EngineService(engine(model)) as service:
        stream = service.stream(endless("a"))

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            main = threading.main_thread().ident
            assert main is not None
            threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGINT]).start()
            with pytest.raises(KeyboardInterrupt):
                next(stream)
        finally:
            signal.signal(signal.SIGINT, before)
        opened.set()
        until(lambda: idle(service))
        assert list(stream) == []


def test_a_late_close_does_not_end_another_request_of_the_same_id(service: EngineService) -> None:
    first = service.stream(request("a"))
    events = [next(first) for _ in range(12)]
    until(lambda: "a" not in service._worker._sinks)  # its finish event lies unread in the queue
    second = service.stream(request("a"))
    first.close()
    assert [event for event in second if isinstance(event, TokenEvent)] == events


def test_an_abort_from_elsewhere_reaches_the_stream(service: EngineService) -> None:
    stream = service.stream(endless("a"))
    next(stream)
    service.abort("unknown")
    service.abort("a")
    assert reason(list(stream)[-1]) == "abort"


def test_five_hundred_random_disconnects_leave_nothing_behind(service: EngineService) -> None:
    """Row 12: before the first token, in prefill, in the middle, after the end."""
    threads = threading.active_count()
    for number in range(500):
        stream = service.stream(request(str(number), "x" * (number % 90 + 1), max_tokens=4))
        for _ in range(number % 7):
            next(stream, None)
        stream.close()
    until(lambda: idle(service))
    assert threading.active_count() == threads


def test_coroutines_share_the_engine(service: EngineService) -> None:
    requests = [request(str(i), f"prompt {i}") for i in range(6)]

    async def collect(one: Request) -> list[Event]:
        return [event async for event in service.astream(one)]

    async def together() -> list[list[Event]]:
        return await asyncio.gather(*map(collect, requests))

    assert asyncio.run(together()) == service.generate(requests)


def test_the_sync_face_works_where_a_loop_is_running(service: EngineService) -> None:
    async def notebook() -> list[Event]:
        return list(service.stream(request("a")))

    assert reason(asyncio.run(notebook())[-1]) == "length"


def test_cancelling_a_task_aborts_its_request(service: EngineService) -> None:
    kept = []  # so that it is not the garbage collector that aborts

    async def consume(name: str) -> None:
        kept.append(service.astream(endless(name)))
        async for _ in kept[-1]:
            pass

    async def cancel() -> None:
        task = asyncio.create_task(consume("a"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(consume("b"), 0.05)
        await asyncio.to_thread(until, lambda: idle(service))  # while the loop still listens

    asyncio.run(cancel())
    assert service._worker.engine.status().computed_tokens < 500  # aborted, not run to its end


@pytest.mark.parametrize("leave", ["aclose", "async with", "drop"])
def test_leaving_an_async_stream_aborts_its_request(service: EngineService, leave: str) -> None:
    async def consume() -> None:
        stream = service.astream(endless("a"))
        await anext(stream)
        if leave == "aclose":
            await stream.aclose()
            assert [event async for event in stream] == []
        elif leave == "async with":
            async with stream:
                await anext(stream)

    asyncio.run(consume())
    until(lambda: idle(service))


def test_a_closed_loop_does_not_hurt_the_others(
    service: EngineService, caplog: pytest.LogCaptureFixture
) -> None:
    kept = []

    async def walk_away() -> None:
        kept.append(service.astream(endless("a")))

    asyncio.run(walk_away())  # the stream outlives its loop
    until(lambda: idle(service))
    assert service._worker.engine.status().computed_tokens < 500  # aborted, not run to its end
    assert "nobody takes the events of request a" in caplog.text
    assert reason(list(service.stream(request("b")))[-1]) == "length"


def test_a_step_that_raises_ends_all_requests_and_the_service_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    served = engine(faulty(ord("!")))
    with EngineService(served) as service:
        bystander = service.stream(endless("a"))
        next(bystander)
        for stream in (service.stream(request("b", "boo!")), bystander):
            last = list(stream)[-1]
            assert isinstance(last, FinishEvent)
            assert last.reason == "error"
            assert last.error == "the engine failed: RuntimeError: the machine is on fire"
        assert idle(service)
        assert reason(list(service.stream(request("c")))[-1]) == "length"
    assert "the machine is on fire" in caplog.text


def test_a_fault_of_the_thread_itself_leaves_nobody_waiting(
    served: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = EngineService(served)

    def broken(**_: Any) -> None:
        raise RuntimeError("cannot even abort")

    stream = service.stream(endless("a"))
    next(stream)
    monkeypatch.setattr(served, "abort_all", broken)
    monkeypatch.setattr(served, "step", broken)
    last = list(stream)[-1]
    assert isinstance(last, FinishEvent)
    assert (last.reason, last.error) == ("error", "the engine thread ended; the log says why")
    assert "cannot even abort" in caplog.text
    with pytest.raises(UsageError, match="closed"):
        service.stream(request("b"))
    service.close()


def test_closing_ends_what_runs_waits_and_is_not_yet_added(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, opened = gate()
    service = EngineService(engine(model, max_sequences=1))
    streams = [service.stream(endless("running"))]
    until(lambda: service._worker._inbox.empty())  # it is in its first step, held at the gate
    streams += [service.stream(endless(name)) for name in ("waiting", "also")]
    closer = threading.Thread(target=service.close)
    closer.start()
    opened.set()
    closer.join(PATIENCE_S)
    assert not closer.is_alive()
    assert [reason(list(stream)[-1]) for stream in streams] == ["abort"] * 3
    service.close()
    for submit in (service.stream, lambda one: service.generate([one])):
        with pytest.raises(UsageError, match="engine is closed"):
            submit(request("late"))
    assert caplog.records == []
