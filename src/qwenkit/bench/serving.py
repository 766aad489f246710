"""Serving, measured: many streams and loads beside other engines, and what the engine itself costs.

Five parts, each with processes of its own: "decode" is the aggregate speed of several streams,
"load" how long requests wait that come at random times, both beside peers and in turns; "overhead"
is what a step costs beyond the model's kernels, "prefix" and "lookup" what the prefix cache and
prompt lookup save.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import qwenkit
from qwenkit.bench.peers.spec import Options
from qwenkit.bench.process import run_worker
from qwenkit.bench.report import SpeedReport
from qwenkit.bench.serving_load import LoadResult, LoadSettings, measure_load
from qwenkit.bench.serving_worker import OwnPart, Task
from qwenkit.bench.serving_workloads import PrefixWorkload
from qwenkit.bench.sources import OURS, launch_for
from qwenkit.bench.speed import Progress, SpeedSettings, machine, measure_speed
from qwenkit.errors import UsageError, suggest

Part = Literal["decode", "overhead", "load", "prefix", "lookup"]
PARTS: tuple[Part, ...] = ("decode", "overhead", "load", "prefix", "lookup")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSettings:
    """`speed` says on what, beside whom and how many turns; the other fields size the parts.

    Raises UsageError on construction for an unknown part, and for "lookup" of random weights, whose
    text repeats nothing.
    """

    speed: SpeedSettings
    load: LoadSettings
    parts: tuple[Part, ...] = PARTS
    streams: int = 8
    steps: int = 64
    prefix: PrefixWorkload = field(default_factory=PrefixWorkload)

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise UsageError(f"part: got {part!r}. {suggest(part, PARTS)}")
        if "lookup" in self.parts and self.speed.source.model is None:
            raise UsageError("part: 'lookup' needs a model that can copy, not random weights.")


@dataclass(slots=True, kw_only=True)
class ServingReport:
    """What was measured; a part that was not asked for is None or empty."""

    settings: ServingSettings
    machine: str
    version: str
    decode: SpeedReport | None = None
    load: list[LoadResult] = field(default_factory=list)
    own: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data for programs."""
        speed = self.settings.speed
        weights = speed.source.weights
        return {
            "bench": "serving",
            "qwenkit": self.version,
            "machine": self.machine,
            "settings": {
                "model": speed.source.name,
                "shape": speed.source.shape,
                "weights": None if weights is None else asdict(weights),
                "threads": speed.threads,
                "turns": speed.turns,
                "streams": self.settings.streams,
                "parts": list(self.settings.parts),
                "load": asdict(self.settings.load),
                "prefix": asdict(self.settings.prefix),
            },
            "decode": None if self.decode is None else self.decode.to_json(),
            "load": [result.to_json() for result in self.load],
            **self.own,
        }


def measure_serving(
    settings: ServingSettings, *, progress: Progress | None = None
) -> ServingReport:
    """Measure the parts one after another. `progress` is called with what is being measured and the
    share done. Raises QwenkitError when our own engine fails.
    """
    given = progress or (lambda what, share: None)
    report = ServingReport(settings=settings, machine=machine(), version=qwenkit.__version__)
    for index, part in enumerate(settings.parts):

        def say(what: str, share: float, done: int = index) -> None:
            given(what, (done + share) / len(settings.parts))

        if part == "decode":
            several = replace(settings.speed, single=False, streams=(settings.streams,))
            report.decode = measure_speed(several, progress=say)
        elif part == "load":
            report.load = measure_load(settings.speed, settings.load, progress=say)
        else:
            report.own[part] = _measure_own(part, settings, say)
    return report


def _measure_own(part: OwnPart, settings: ServingSettings, say: Progress) -> list[dict[str, Any]]:
    speed = settings.speed
    options = Options(threads=speed.threads, most_prompt_tokens=1, most_positions=1)
    launch = launch_for(OURS, sys.executable, speed.source, options, speed.cache / "bench", say)
    task = Task(
        part=part,
        model=str(launch.model),
        threads=speed.threads,
        weights=speed.source.weights,
        turns=speed.turns,
        streams=settings.streams,
        steps=settings.steps,
        prefix=settings.prefix,
    )
    return run_task(task, lambda what: say(what, 0.0))


def run_task(task: Task, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The results of a task, done in a process of its own. Raises QwenkitError when it fails."""
    argument = json.dumps(task.to_json())
    done = run_worker(task.part, "qwenkit.bench.serving_worker", argument, say)
    results: list[dict[str, Any]] = done["results"]
    return results
