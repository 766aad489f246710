"""How well `qwenkit plan` predicts memory: each cell of a grid runs in a process of its own.

The process itself is measured the same way, with a model that is hardly there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Self

from qwenkit.bench.memory_worker import Measured, Task
from qwenkit.bench.random_model import write_random_folder
from qwenkit.bench.shapes import shape as shape_config
from qwenkit.bench.sources import random_folder
from qwenkit.bench.speed import machine
from qwenkit.checkpoint.atomic import replacing
from qwenkit.errors import CheckpointError, QwenkitError
from qwenkit.formats.plan import WeightPlan
from qwenkit.models.spec import find
from qwenkit.survey.plan_memory import Memory, Workload, estimate
from qwenkit.survey.plan_weights import weigh

Progress = Callable[[str, float], None]

_WORKER = ("-m", "qwenkit.bench.memory_worker")
_SMALLEST: Mapping[str, Any] = {  # but for its vocabulary, which the tokenizer's memory goes by
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "intermediate_size": 128,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One prediction and what came of it."""

    shape: str
    weights: str
    users: int
    tokens: int
    predicted: Memory
    measured: Measured

    @property
    def error(self) -> float:
        """How far the predicted peak is above the measured one, as a share of it."""
        return self.predicted.peak_bytes / self.measured.peak_bytes - 1

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `MemoryReport.to_json` for one cell."""
        predicted, measured = Memory(**data["predicted"]), Measured(**data["measured"])
        return cls(
            data["shape"], data["weights"], data["users"], data["tokens"], predicted, measured
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """All cells, on `machine`, with so many `threads`."""

    machine: str
    threads: int
    command: str
    cells: tuple[Cell, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data; sizes in bytes."""
        return asdict(self) | {"cells": [asdict(c) | {"error": c.error} for c in self.cells]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is measured: every combination. `cache` holds the random models."""

    shapes: tuple[str, ...]
    weights: tuple[str, ...]
    users: tuple[int, ...]
    tokens: tuple[int, ...]
    threads: int
    cache: Path

    def cells(self) -> Iterator[tuple[str, str, int, int]]:
        """Shape, weights, users and tokens of each cell."""
        return product(self.shapes, self.weights, self.users, self.tokens)


def measure_memory(
    grid: Grid,
    report: MemoryReport,
    *,
    save: Callable[[MemoryReport], None],
    progress: Progress | None = None,
) -> MemoryReport:
    """Fill in the cells of `grid` that `report` lacks, handing each new state to `save`.

    Raises QwenkitError with the last words of a process that fails.
    """
    show = progress or (lambda what, share: None)
    wanted = list(grid.cells())
    have = {(c.shape, c.weights, c.users, c.tokens) for c in report.cells}
    for done, where in enumerate(wanted):
        if where in have:
            continue
        shape, weights, users, tokens = where
        show(f"{shape} {weights}, {users} × {tokens}", done / len(wanted))
        folder = random_folder(shape, grid.cache / "bench" / "random" / shape, show)
        task = Task(
            model=str(folder), weights=weights, users=users, tokens=tokens, threads=grid.threads
        )
        config = shape_config(shape)
        process = measure_process(int(config["vocab_size"]), grid.threads)
        cell = Cell(*where, predict(config, task, process_bytes=process), measure(task))
        report = replace(report, cells=(*report.cells, cell))
        save(report)
    return report


def predict(config: Mapping[str, Any], task: Task, *, process_bytes: int) -> Memory:
    """What the plan says of a model of random bf16 numbers."""
    architecture = find(str(config["model_type"]))
    read = architecture.config(config)
    plan = WeightPlan(task.weights, task.group_size, task.head_weights)
    weights = weigh(architecture, read, plan, lambda name: "BF16")
    work = Workload(users=task.users, tokens=task.tokens, threads=task.threads)
    return estimate(read, weights, work, process_bytes=process_bytes)


@cache
def measure_process(vocab_size: int, threads: int) -> int:
    """Resident bytes of a process that serves a model of hardly any weights: Python, torch and the
    other libraries, and a tokenizer of `vocab_size` tokens.
    """
    config = {**_SMALLEST, "vocab_size": vocab_size}
    with tempfile.TemporaryDirectory(prefix="qwenkit-plan-") as folder:
        model = Path(folder) / "smallest"
        write_random_folder(model, config)
        task = Task(model=str(model), weights="int8", users=1, tokens=64, threads=threads)
        running = measure(task).running_bytes
    return running - predict(config, task, process_bytes=0).running_bytes


def measure(task: Task) -> Measured:
    """Do the task in a process of its own. Raises QwenkitError with its last words if it fails."""
    command = [sys.executable, *_WORKER, json.dumps(asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        raise QwenkitError(f"The process that measures memory failed: {words[-1]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def new_report(grid: Grid, command: str) -> MemoryReport:
    """Without any cell."""
    return MemoryReport(machine=machine(), threads=grid.threads, command=command)


def read_report(file: Path, empty: MemoryReport) -> MemoryReport:
    """What `file` holds already, or `empty`. Raises CheckpointError where it is of another machine
    or was not written by `write_report`.
    """
    if not file.exists():
        return empty
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        found = (data["machine"], data["threads"])
        cells = []
        for entry in data["cells"]:
            del entry["error"]
            cells.append(Cell.from_json(entry))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            file, "report", "is no report of bench memory; name another."
        ) from error
    if found != (empty.machine, empty.threads):
        raise CheckpointError(file, "report", f"was measured on {found}; name another file.")
    return replace(empty, cells=tuple(cells))


def write_report(file: Path, report: MemoryReport) -> None:
    """As JSON, at once or not at all."""
    with replacing(file) as written:
        written.write(f"{json.dumps(report.to_json(), indent=1)}\n".encode())
