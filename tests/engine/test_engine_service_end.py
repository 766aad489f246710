"""How a service ends: when it is dropped, when the program is left, beside another one."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from test_engine_service import PATIENCE_S, engine, reason, request

from fakes import tiny_model
from qwenkit.engine.service import EngineService


def test_a_dropped_service_ends_its_thread_and_frees_the_engine() -> None:
    served = engine()
    gone = weakref.ref(served)
    service = EngineService(served)
    thread = service._worker._thread
    stream = service.stream(request("a"))
    del service
    assert reason(list(stream)[-1]) == "length"  # a stream keeps its service
    del stream, served
    gc.collect()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    gc.collect()
    assert gone() is None


def test_two_engines_in_one_process_do_not_meet() -> None:
    other_model = tiny_model(seed=5)
    requests = [request(str(i), f"prompt {i}") for i in range(5)]
    with EngineService(engine()) as first, EngineService(engine(other_model)) as second:
        alone = first.generate(requests), second.generate(requests)
        streams = [service.stream_many(requests) for service in (first, second)]
        together = [list(stream) for stream in streams]
    assert alone[0] != alone[1]
    for events, expected in zip(together, alone, strict=True):
        for one, wanted in zip(requests, expected, strict=True):
            assert [event for event in events if event.request_id == one.id] == wanted


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "raise KeyError('x')"])
def test_the_interpreter_ends_while_requests_run(ending: str) -> None:
    tests = Path(__file__).parents[1]
    code = f"""
import sys
sys.path[:0] = [{str(tests)!r}, {str(tests / "engine")!r}]
from test_engine_service import EngineService, endless, engine
import torch
torch.set_num_threads(1)
service = EngineService(engine())
streams = [service.stream(endless(str(i))) for i in range(3)]
next(streams[0])
print("running", flush=True)
{ending}
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout == "running\n"
    assert result.returncode == {"": 0, "raise SystemExit(3)": 3}.get(ending, 1)
    assert ("KeyError" in result.stderr) == ("KeyError" in ending)
    assert "Fatal" not in result.stderr
