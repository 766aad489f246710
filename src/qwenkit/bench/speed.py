"""Prefill and decode speed beside peers: engines take turns in warm processes of their own.

Each turn stands between two calibrations of the machine. A ratio is the median of the ratios of
turns that followed each other, so that a slow spell of the machine weighs on both sides.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import qwenkit
from qwenkit.bench.calibrate import Calibrator
from qwenkit.bench.environments import python_for
from qwenkit.bench.peers.spec import Options, Work
from qwenkit.bench.process import WorkerProcess
from qwenkit.bench.report import EngineResult, SpeedReport, Turn
from qwenkit.bench.sources import OURS, Source, launch_for
from qwenkit.errors import QwenkitError

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedSettings:
    """What is measured, beside whom. `peers` are names of `environments.RECIPES`; `peer_python`
    runs all of them (None: each its own environment below `cache`, made if `make_peers`).

    `streams` and `contexts` add measurements: decoding of so many sequences at once, and of one
    that has so many tokens already; `single` False leaves only these.
    """

    source: Source
    cache: Path
    threads: int = 2
    prompt_tokens: int = 512
    decode_tokens: int = 48
    single: bool = True
    streams: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    turns: int = 5
    peers: tuple[str, ...] = ("llama.cpp", "transformers")
    peer_python: str | None = None
    make_peers: bool = False
    compute: str = "auto"

    def plan(self) -> tuple[Work, ...]:
        """The measurements in their order."""
        decode = Work("decode", self.decode_tokens)
        single = Work("prefill", self.prompt_tokens), decode
        return (
            *(single if self.single else ()),
            *(replace(decode, streams=count) for count in self.streams),
            *(replace(decode, context=tokens) for tokens in self.contexts),
        )

    def options(self) -> Options:
        """What every engine must be ready for."""
        return Options(
            threads=self.threads,
            most_prompt_tokens=self.prompt_tokens,
            most_positions=max(work.positions for work in self.plan()),
            most_streams=max(work.streams for work in self.plan()),
            compute=self.compute,
        )


def measure_speed(settings: SpeedSettings, *, progress: Progress | None = None) -> SpeedReport:
    """Measure ours and every peer in turns. A peer that fails is reported with its reason.

    `progress` is called with what is being measured and the share done. Raises QwenkitError when
    our own engine fails.
    """
    report = progress or (lambda what, share: None)
    calibrator = Calibrator(settings.threads)
    with ExitStack() as stack:
        running, results = start_engines(stack, settings, settings.options(), report)
        _take_turns(running, results, settings.plan(), settings.turns, calibrator, report)
    return SpeedReport(
        source=settings.source,
        plan=settings.plan(),
        threads=settings.threads,
        turns_each=settings.turns,
        compute=settings.compute,
        machine=machine(),
        vendor=processor_fact("vendor_id") or "",
        version=qwenkit.__version__,
        engines=list(results.values()),
    )


def start_engines(
    stack: ExitStack, settings: SpeedSettings, options: Options, report: Progress
) -> tuple[dict[str, WorkerProcess], dict[str, EngineResult]]:
    """Ours and every peer, each ready in a process that ends with `stack`; and of each what it is,
    or why it could not start. Raises QwenkitError when our own engine cannot.
    """
    results: dict[str, EngineResult] = {}
    running: dict[str, WorkerProcess] = {}
    for engine in (OURS, *settings.peers):
        report(f"loading {engine}", 0.0)
        try:
            worker = stack.enter_context(_start(engine, settings, options, report))
            version, setting = worker.hello()
            results[engine] = EngineResult(engine, version=version, setting=setting)
            running[engine] = worker
        except QwenkitError as error:
            if engine == OURS:
                raise
            results[engine] = EngineResult(engine, error=str(error))
    return running, results


def _start(
    engine: str, settings: SpeedSettings, options: Options, report: Progress
) -> WorkerProcess:
    if engine == OURS:
        python = sys.executable
    elif settings.peer_python is not None:
        python = settings.peer_python
    else:
        python = python_for(
            engine,
            settings.cache / "peers",
            make=settings.make_peers,
            progress=lambda what: report(what, 0.0),
        )
    launch = launch_for(engine, python, settings.source, options, settings.cache / "bench", report)
    return WorkerProcess(launch)


def _take_turns(
    running: dict[str, WorkerProcess],
    results: dict[str, EngineResult],
    plan: Sequence[Work],
    count: int,
    calibrator: Calibrator,
    report: Progress,
) -> None:
    """Fill `results`. A peer that fails gets its reason and takes no further turn."""
    total, done = len(plan) * (count + 1) * len(running), 0
    for work in plan:
        for turn in range(count + 1):
            for engine in list(running):
                report(f"{work.name.replace('_', ' ')}, {engine}", done / total)
                done += 1
                result = results[engine]
                before = calibrator.read()
                try:
                    answer = running[engine].measure(work)
                except QwenkitError as error:
                    if engine == OURS:
                        raise
                    del running[engine]
                    kept = {m: t for m, t in result.turns.items() if m != work.name}
                    results[engine] = replace(result, error=str(error), turns=kept)
                    continue
                peak = max(result.peak_bytes, answer["peak_bytes"])
                results[engine] = replace(result, peak_bytes=peak)
                if turn > 0:  # the first one warms caches and threads
                    speed = work.tokens * work.streams / answer["seconds"]
                    taken = Turn(speed, before, calibrator.read())
                    result.turns.setdefault(work.name, []).append(taken)


def machine() -> str:
    """The processor's name, as the system gives it."""
    return processor_fact("model name") or platform.processor() or platform.machine()


def processor_fact(name: str) -> str | None:
    """A line of what Linux says about the first processor; None elsewhere."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return None
