"""Requests that come at random times: how long they wait for tokens, by engine, in turns.

Times between arrivals are exponential (a Poisson process) and lengths log-uniform, from a generator
of one seed. An engine that cannot keep up lets its queue grow, which the times show: they count
from when a request came, not from when the engine took it.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from qwenkit.bench.peers.spec import Arrival, Load
from qwenkit.bench.process import WorkerProcess
from qwenkit.bench.report import EngineResult
from qwenkit.bench.sources import OURS
from qwenkit.bench.speed import Progress, SpeedSettings, start_engines
from qwenkit.errors import QwenkitError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """`requests` come at `rate` a second on average; lengths are ranges, in tokens. A peer decodes
    at most `streams` at a time. Turn t of every engine gets the load of `seed` + t.

    Raises UsageError naming the setting on construction.
    """

    rate: float = 1.0
    requests: int = 32
    prompt_tokens: tuple[int, int] = (16, 512)
    answer_tokens: tuple[int, int] = (16, 128)
    streams: int = 8
    turns: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise UsageError(f"rate: expected requests per second, above 0; got {self.rate}.")

    def load(self, turn: int) -> Load:
        """What a turn is given; turn 0, which warms, fewer and without waiting."""
        generator = random.Random(self.seed + turn)
        if turn == 0:
            longest = self.prompt_tokens[1], self.answer_tokens[0]
            return Load((Arrival(0.0, *longest),) * min(self.streams, self.requests))
        arrivals, now_s = [], 0.0
        for _ in range(self.requests):
            prompt = _log_uniform(generator, self.prompt_tokens)
            answer = _log_uniform(generator, self.answer_tokens)
            arrivals.append(Arrival(now_s, prompt, answer))
            now_s += generator.expovariate(self.rate)
        return Load(tuple(arrivals))


def _log_uniform(generator: random.Random, bounds: tuple[int, int]) -> int:
    low, high = bounds
    return min(high, int(math.exp(generator.uniform(math.log(low), math.log(high + 1)))))


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Seconds: half of all waits are at most `p50_s`, 99 of 100 at most `p99_s`."""

    p50_s: float
    p99_s: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """By the nearest rank; of nothing 0."""
        ordered = sorted(values)
        if not ordered:
            return cls(0.0, 0.0)
        ranks = (math.ceil(share * len(ordered)) - 1 for share in (0.5, 0.99))
        return cls(*(ordered[rank] for rank in ranks))


@dataclass(slots=True)
class LoadResult:
    """What an engine did with the loads; all requests of all turns together.

    `tokens_per_second` has each turn's answer tokens over the time until the last of them.
    """

    engine: EngineResult
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)

    def add(self, load: Load, times: Sequence[Sequence[float]]) -> None:
        """Count one turn: `times` as of `peers.spec.Server.play`.

        Raises QwenkitError where a request got another number of tokens than it asked for.
        """
        for arrival, own in zip(load.arrivals, times, strict=True):
            if len(own) != arrival.tokens:
                raise QwenkitError(
                    f"{self.engine.engine}: a request for {arrival.tokens} tokens got {len(own)}."
                )
            self.first_s.append(own[0] - arrival.at_s)
            self.between_s += [later - sooner for sooner, later in pairwise(own)]
        total = sum(map(len, times))
        self.tokens_per_second.append(total / max(own[-1] for own in times))

    def median_speed(self) -> float | None:
        """Tokens per second; None of an engine that did not come through a turn."""
        return statistics.median(self.tokens_per_second) if self.tokens_per_second else None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        done = bool(self.tokens_per_second)
        return {
            "engine": self.engine.engine,
            "version": self.engine.version,
            "weights": self.engine.setting,
            "error": self.engine.error,
            "tokens_per_second": self.median_speed(),
            "first_token": asdict(Percentiles.of(self.first_s)) if done else None,
            "between_tokens": asdict(Percentiles.of(self.between_s)) if done else None,
            "turns": self.tokens_per_second,
        }


def measure_load(
    settings: SpeedSettings, load: LoadSettings, *, progress: Progress
) -> list[LoadResult]:
    """Give ours and every peer the same loads, in turns. A peer that fails is reported with its
    reason. Raises QwenkitError when our own engine fails.
    """
    loads = [load.load(turn) for turn in range(load.turns + 1)]
    options = replace(
        settings.options(),
        serves=True,
        most_prompt_tokens=max(each.most_prompt_tokens for each in loads),
        most_positions=max(each.most_positions for each in loads),
        most_streams=load.streams,
    )
    with ExitStack() as stack:
        running, engines = start_engines(stack, settings, options, progress)
        results = {name: LoadResult(engine) for name, engine in engines.items()}
        total, done = len(loads) * len(running), 0
        for turn, given in enumerate(loads):
            for engine in list(running):
                progress(f"load, {engine}", done / total)
                done += 1
                _take_turn(running, results[engine], given, is_warm=turn > 0)
    return list(results.values())


def _take_turn(
    running: dict[str, WorkerProcess], result: LoadResult, load: Load, *, is_warm: bool
) -> None:
    name = result.engine.engine
    try:
        times = running[name].measure(load)["times"]
        if is_warm:
            result.add(load, times)
    except QwenkitError as error:
        if name == OURS:
            raise
        del running[name]
        result.engine = replace(result.engine, error=str(error))
