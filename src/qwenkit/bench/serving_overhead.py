"""What an engine's step costs beyond the kernels of its model, part by part.

The engine is stepped in a thread of its own, as it is served (torch's threads, which loading left
in the first one, get in the way of the kernels' there), while several sequences decode. After each
step the model's own kernel calls, as they were recorded for that step, are repeated alone: on the
same sequences, with the same threads awake, at the same moment of a shared machine. They write to
the cache what the step has written, so nothing changes by it.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import qwenkit.engine.engine as engine_module
from qwenkit.api import LLM
from qwenkit.bench.peers.spec import prompt_ids
from qwenkit.engine.active import Active
from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Request
from qwenkit.engine.runner import Runner
from qwenkit.engine.sampler import Sampler
from qwenkit.engine.scheduler import Scheduler
from qwenkit.engine.service import EngineService
from qwenkit.engine.settings import EngineSettings
from qwenkit.errors import QwenkitError
from qwenkit.kernels.cpu.replay import Program
from qwenkit.types.sampling import SamplingParams

_WARM_STEPS = 4  # in them steps are recorded
_PROMPT_TOKENS = 64
_WATCHED = (
    (Scheduler, "schedule"),
    (Scheduler, "apply"),
    (Runner, "rows"),
    (Program, "run"),
    (engine_module, "chosen_together"),
    (Active, "take"),
    (Sampler, "choose"),
)
_PARTS = ("schedule", "apply", "rows", "chosen_together", "take")  # of a step


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Medians over an engine's steps, in milliseconds; `kept` is the median of what the kernels
    alone took over what the step next to them took. The other fields are parts of `step_ms`:
    `kernels_ms` those of the model within the step, `batch_ms` what surrounds them, `text_ms` text
    and events, `rest_ms` the loop that joins them.
    """

    sampling: str
    streams: int
    vocab_rows: int
    steps: int
    alone_ms: float
    step_ms: float
    kept: float
    scheduling_ms: float
    batch_ms: float
    kernels_ms: float
    sampling_ms: float
    text_ms: float
    rest_ms: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def new_engine(llm: LLM, settings: EngineSettings) -> Engine:
    """Another engine for a loaded model; it has no thread."""
    return Engine(
        llm.model,
        llm.tokenizer,
        settings,
        stop_token_ids=llm.record.stop_token_ids,
        context_tokens=llm.context_tokens,
        trained_tokens=llm.record.trained_context_tokens,
        rope=llm.rope,
    )


def measure_overhead(
    llm: LLM, name: str, sampling: SamplingParams, *, streams: int, steps: int
) -> Overhead:
    """Of `steps` steps in which `streams` sequences decode. `name` is what `sampling` is called.

    Raises QwenkitError where the model's steps are not recorded: without native kernels.
    """
    tokens = streams + _WARM_STEPS + steps + 1  # who is first has some before the last one starts
    room = streams * (_PROMPT_TOKENS + tokens + llm.engine_settings.block_tokens)
    engine = new_engine(llm, replace(llm.engine_settings, kv_cache_tokens=room))
    chosen = sampling.replace(max_tokens=tokens, min_tokens=0, ignore_eos=True, seed=0)
    prompts = [prompt_ids(_PROMPT_TOKENS, llm.tokenizer.vocab_size, i) for i in range(streams)]
    requests = [Request(str(i), tuple(ids), chosen) for i, ids in enumerate(prompts)]
    with EngineService(engine) as service:
        measured = service.call(lambda engine: _steps(engine, requests, steps))
    return _summary(measured, name, streams=streams, vocab_rows=llm.config.vocab_size)


def _steps(engine: Engine, requests: Sequence[Request], steps: int) -> list[dict[str, float]]:
    """Seconds of each step by the names of methods, of "step" and of "alone"."""
    for request in requests:
        engine.add(request)
    started: set[str] = set()
    while len(started) < len(requests):
        started |= {event.request_id for event in engine.step()}
    measured: list[dict[str, float]] = []
    with _watching() as watch:
        for step in range(_WARM_STEPS + steps):
            parts = watch.time(engine.step)
            if step >= _WARM_STEPS:
                measured.append(parts | {"alone": watch.repeat_kernels()})
    engine.abort_all()
    return measured


def _summary(
    measured: list[dict[str, float]], name: str, *, streams: int, vocab_rows: int
) -> Overhead:
    def median_ms(seconds: Callable[[dict[str, float]], float]) -> float:
        return 1e3 * statistics.median(map(seconds, measured))

    return Overhead(
        sampling=name,
        streams=streams,
        vocab_rows=vocab_rows,
        steps=len(measured),
        alone_ms=median_ms(lambda s: s["alone"]),
        step_ms=median_ms(lambda s: s["step"]),
        kept=statistics.median(s["alone"] / s["step"] for s in measured),
        scheduling_ms=median_ms(lambda s: s["schedule"] + s["apply"]),
        batch_ms=median_ms(lambda s: s["rows"] - s["run"]),
        kernels_ms=median_ms(lambda s: s["run"]),
        sampling_ms=median_ms(lambda s: s["chosen_together"] + s["choose"]),
        text_ms=median_ms(lambda s: s["take"] - s["choose"]),
        rest_ms=median_ms(lambda s: s["step"] - sum(s[name] for name in _PARTS)),
    )


class _Watch:
    """Sums the time spent in methods by their name, and knows the last recorded program run."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.program: Program | None = None

    def time(self, work: Callable[[], object]) -> dict[str, float]:
        """Seconds of `work` as "step", and within it by method."""
        self.seconds.clear()
        start_s = time.perf_counter()
        work()
        step_s = time.perf_counter() - start_s
        return {name: self.seconds[name] for _, name in _WATCHED} | {"step": step_s}

    def repeat_kernels(self) -> float:
        """Seconds that the last program takes once more."""
        if self.program is None:
            raise QwenkitError("overhead: this model's steps are not recorded on this machine.")
        start_s = time.perf_counter()
        self.program.run()
        return time.perf_counter() - start_s

    def watched(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same method, timed."""
        seconds, clock = self.seconds, time.perf_counter

        def run(*arguments: Any, **named: Any) -> Any:
            if isinstance(arguments[0], Program):
                self.program = arguments[0]
            start_s = clock()
            result = method(*arguments, **named)
            seconds[name] += clock() - start_s
            return result

        return run


@contextmanager
def _watching() -> Iterator[_Watch]:
    """Times the methods that are watched while the block runs, in this process."""
    watch = _Watch()
    with ExitStack() as stack:
        for owner, name in _WATCHED:
            method = getattr(owner, name)
            setattr(owner, name, watch.watched(method, name))
            stack.callback(setattr, owner, name, method)
        yield watch
