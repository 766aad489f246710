"""Prefill and decode speed beside peers: engines take turns in warm processes of their own.

Each turn stands between two calibrations of the machine. A ratio is the median of the ratios of
turns that followed each other, so that a slow spell of the machine weighs on both sides.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import qwenkit
from qwenkit.bench import workers
from qwenkit.bench.calibrate import Calibration, Calibrator
from qwenkit.errors import QwenkitError

MOVED_LIMIT = 0.10
OURS = "qwenkit"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedSettings:
    """What is measured. `peers` are names of `workers.ENGINES`; `peer_python` runs them."""

    model: Path
    threads: int = 2
    prompt_tokens: int = 512
    decode_tokens: int = 48
    turns: int = 5
    peers: tuple[str, ...] = ("llama.cpp", "transformers")
    peer_python: str = sys.executable
    compute: str = "auto"
    config: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One measurement with the calibrations around it."""

    tokens_per_second: float
    before: Calibration
    after: Calibration

    @property
    def steady(self) -> bool:
        """True when the machine gave the same before and after, within 10 %."""
        return self.before.moved(self.after) <= MOVED_LIMIT


@dataclass(frozen=True, slots=True)
class EngineResult:
    """One engine: turns by measure ("prefill", "decode").

    `error` is why the engine could not start (`version` is None) or what ended it: the measure
    that it ended in is left out, what was complete before stays.
    """

    engine: str
    version: str | None = None
    error: str | None = None
    peak_bytes: int = 0
    turns: dict[str, list[Turn]] = field(default_factory=dict)

    def median(self, measure: str) -> float | None:
        """Median tokens per second."""
        turns = self.turns.get(measure)
        return statistics.median(t.tokens_per_second for t in turns) if turns else None


@dataclass(frozen=True, slots=True)
class SpeedReport:
    """Everything measured; ours is the first engine."""

    settings: SpeedSettings
    machine: str
    version: str
    engines: list[EngineResult]

    def ratio(self, peer: EngineResult, measure: str) -> float | None:
        """Our speed over a peer's: the median over turns that followed each other."""
        ours, theirs = self.engines[0].turns.get(measure), peer.turns.get(measure)
        if not ours or not theirs:
            return None
        pairs = zip(ours, theirs, strict=True)
        return statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in pairs)

    def unsteady_turns(self) -> int:
        """Turns during which the machine's own speed moved by more than 10 %."""
        return sum(not t.steady for t in self._turns())

    def turn_count(self) -> int:
        """All turns."""
        return sum(1 for _ in self._turns())

    def _turns(self) -> Iterator[Turn]:
        for engine in self.engines:
            for turns in engine.turns.values():
                yield from turns

    def to_json(self) -> dict[str, Any]:
        """Plain data for programs: settings, machine, figures and ratios."""
        settings = asdict(self.settings)
        settings["model"] = self.settings.model.name
        del settings["peer_python"]
        return {
            "bench": "speed",
            "qwenkit": self.version,
            "machine": self.machine,
            "settings": settings,
            "engines": [self._engine_json(e) for e in self.engines],
            "turns": self.turn_count(),
            "unsteady_turns": self.unsteady_turns(),
        }

    def _engine_json(self, engine: EngineResult) -> dict[str, Any]:
        measures = {
            measure: {
                "tokens_per_second": engine.median(measure),
                "best_tokens_per_second": max(t.tokens_per_second for t in turns),
                "qwenkit_ratio": self.ratio(engine, measure),
                "turns": [asdict(t) | {"steady": t.steady} for t in turns],
            }
            for measure, turns in engine.turns.items()
        }
        return {
            "engine": engine.engine,
            "version": engine.version,
            "error": engine.error,
            "peak_bytes": engine.peak_bytes,
            **measures,
        }


class WorkerProcess:
    """An engine in its own process. Raises QwenkitError when it cannot start or stops answering."""

    def __init__(self, engine: str, settings: SpeedSettings) -> None:
        python = sys.executable if engine == OURS else settings.peer_python
        options: dict[str, Any] = {
            "prompt_tokens": settings.prompt_tokens,
            "decode_tokens": settings.decode_tokens,
        }
        options |= {"compute": settings.compute} if engine == OURS else {"config": settings.config}
        command = [python, str(Path(workers.__file__)), engine, str(settings.model)]
        command += ["--threads", str(settings.threads), "--settings", json.dumps(options)]
        self._engine = engine
        # A file: a pipe that nobody reads would fill up. It is closed where the process ends.
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._messages,
                text=True,
            )
        except OSError as error:
            self._messages.close()
            raise QwenkitError(f"{engine}: cannot start {python}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):  # a request that a dead process never took
            self._process.communicate()
        self._messages.close()

    def version(self) -> str:
        """The engine's version: its first line, once the model is loaded."""
        return str(self._read()["version"])

    def measure(self, measure: str, tokens: int) -> dict[str, Any]:
        """One measurement: {"seconds": …, "peak_bytes": …}."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died: reading says why
            self._process.stdin.write(json.dumps({"measure": measure, "tokens": tokens}) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                message: dict[str, Any] = json.loads(line)
                return message
        status = self._process.wait()
        self._messages.seek(0)
        lines = self._messages.read().strip().splitlines() or [f"ended with status {status}"]
        raise QwenkitError(f"{self._engine}: {lines[-1]}")


def measure_speed(
    settings: SpeedSettings, *, progress: Callable[[str, float], None] | None = None
) -> SpeedReport:
    """Measure ours and every peer in turns. A peer that fails is reported with its reason.

    `progress` is called with what is being measured and the share done. Raises QwenkitError when
    our own engine fails.
    """
    calibrator = Calibrator(settings.threads)
    results: dict[str, EngineResult] = {}
    running: dict[str, WorkerProcess] = {}
    with ExitStack() as stack:
        for engine in (OURS, *settings.peers):
            _report(progress, f"loading {engine}", 0.0)
            try:
                worker = stack.enter_context(WorkerProcess(engine, settings))
                results[engine] = EngineResult(engine, version=worker.version())
                running[engine] = worker
            except QwenkitError as error:
                if engine == OURS:
                    raise
                results[engine] = EngineResult(engine, error=str(error))
        plan = [("prefill", settings.prompt_tokens), ("decode", settings.decode_tokens)]
        _take_turns(running, results, plan, settings.turns, calibrator, progress)
    return SpeedReport(
        settings=settings,
        machine=machine(),
        version=qwenkit.__version__,
        engines=list(results.values()),
    )


def _take_turns(
    running: dict[str, WorkerProcess],
    results: dict[str, EngineResult],
    plan: Sequence[tuple[str, int]],
    count: int,
    calibrator: Calibrator,
    progress: Callable[[str, float], None] | None,
) -> None:
    """Fill `results`. A peer that fails gets its reason and takes no further turn."""
    total, done = len(plan) * (count + 1) * len(running), 0
    for measure, tokens in plan:
        for turn in range(count + 1):
            for engine in list(running):
                _report(progress, f"{measure}, {engine}", done / total)
                done += 1
                result = results[engine]
                before = calibrator.read()
                try:
                    answer = running[engine].measure(measure, tokens)
                except QwenkitError as error:
                    if engine == OURS:
                        raise
                    del running[engine]
                    kept = {m: t for m, t in result.turns.items() if m != measure}
                    results[engine] = replace(result, error=str(error), turns=kept)
                    continue
                peak = max(result.peak_bytes, answer["peak_bytes"])
                results[engine] = replace(result, peak_bytes=peak)
                if turn > 0:  # the first one warms caches and threads
                    taken = Turn(tokens / answer["seconds"], before, calibrator.read())
                    result.turns.setdefault(measure, []).append(taken)


def _report(progress: Callable[[str, float], None] | None, what: str, share: float) -> None:
    if progress is not None:
        progress(what, share)


def machine() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
