"""What a speed measurement gives: turns, medians, ratios, and whether they may be trusted."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qwenkit.bench.calibrate import Calibration
from qwenkit.bench.expected import Expectation, expected
from qwenkit.bench.peers.spec import Work
from qwenkit.bench.sources import Source

MOVED_LIMIT = 0.10


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
    """One engine: turns by the name of the work.

    `error` is why the engine could not start (`version` is None) or what ended it: the measure
    that it ended in is left out, what was complete before stays. `setting` is how it holds weights.
    """

    engine: str
    version: str | None = None
    error: str | None = None
    setting: str = ""
    peak_bytes: int = 0
    turns: dict[str, list[Turn]] = field(default_factory=dict)

    def median(self, measure: str) -> float | None:
        """Median tokens per second, of all streams together."""
        turns = self.turns.get(measure)
        return statistics.median(t.tokens_per_second for t in turns) if turns else None

    def best(self, measure: str) -> float | None:
        """The best turn's tokens per second."""
        turns = self.turns.get(measure)
        return max(t.tokens_per_second for t in turns) if turns else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedReport:
    """Everything measured; ours is the first engine."""

    source: Source
    plan: tuple[Work, ...]
    threads: int
    turns_each: int
    compute: str
    machine: str
    vendor: str
    version: str
    engines: list[EngineResult]

    def ratio(self, peer: EngineResult, measure: str) -> float | None:
        """Our speed over a peer's: the median over turns that followed each other."""
        ours, theirs = self.engines[0].turns.get(measure), peer.turns.get(measure)
        if not ours or not theirs:
            return None
        pairs = zip(ours, theirs, strict=True)
        return statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in pairs)

    def best_calibration(self) -> Calibration | None:
        """The best that the machine gave at any time of the run."""
        return _best([*self._turns()])

    def expectation(self, peer: EngineResult, measure: str) -> Expectation | None:
        """What the peer must reach for the run to count, by the best that the machine gave around
        its own turns; None where nothing is known.
        """
        best = _best(peer.turns.get(measure, ()))
        if best is None:
            return None
        prompt = next((w.tokens for w in self.plan if w.measure == "prefill"), 0)
        return expected(
            peer.engine,
            self.source.shape,
            self.source.peer_weights(),
            measure,
            best=best,
            prompt_tokens=prompt,
            vendor=self.vendor,
        )

    def void(self, peer: EngineResult, measure: str) -> bool:
        """The peer came out slower than it is known to be: its ratio says nothing."""
        known, best = self.expectation(peer, measure), peer.best(measure)
        return known is not None and best is not None and best < known.needed

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
        best = self.best_calibration()
        weights = self.source.weights
        return {
            "bench": "speed",
            "qwenkit": self.version,
            "machine": self.machine,
            "settings": {
                "model": self.source.name,
                "shape": self.source.shape,
                "weights": None if weights is None else asdict(weights),
                "storage": self.source.storage if weights is None and self.source.shape else None,
                "threads": self.threads,
                "turns": self.turns_each,
                "compute": self.compute,
                "plan": [work.to_json() | {"name": work.name} for work in self.plan],
            },
            "best_calibration": None if best is None else asdict(best),
            "engines": [self._engine_json(e) for e in self.engines],
            "turns": self.turn_count(),
            "unsteady_turns": self.unsteady_turns(),
        }

    def _engine_json(self, engine: EngineResult) -> dict[str, Any]:
        measures: dict[str, Any] = {}
        for measure, turns in engine.turns.items():
            known = self.expectation(engine, measure)
            measures[measure] = {
                "tokens_per_second": engine.median(measure),
                "best_tokens_per_second": engine.best(measure),
                "qwenkit_ratio": self.ratio(engine, measure),
                "expected": None if known is None else asdict(known),
                "void": self.void(engine, measure),
                "turns": [asdict(t) | {"steady": t.steady} for t in turns],
            }
        return {
            "engine": engine.engine,
            "version": engine.version,
            "weights": engine.setting,
            "error": engine.error,
            "peak_bytes": engine.peak_bytes,
            **measures,
        }


def _best(turns: Sequence[Turn]) -> Calibration | None:
    readings = [reading for t in turns for reading in (t.before, t.after)]
    if not readings:
        return None
    return Calibration(
        max(r.read_gb_per_s for r in readings), max(r.compute_gflop_per_s for r in readings)
    )
