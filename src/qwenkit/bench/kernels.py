"""Every op's speed on the shapes of real models, called through the registry as models call it,
beside the machine's ceilings and torch's own operator.
"""

from __future__ import annotations

import importlib
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import torch

import qwenkit
from qwenkit.bench.ceilings import Ceilings, measure_ceilings
from qwenkit.bench.kernel_job import ROWS, Job
from qwenkit.bench.kernel_jobs import BUILDERS
from qwenkit.bench.shapes import shape
from qwenkit.bench.speed import machine
from qwenkit.errors import KernelError, UsageError, suggest
from qwenkit.kernels import cpu, ops
from qwenkit.kernels.registry import OPS

DEFAULT_SHAPES = ("smollm2-135m", "qwen2-0.5b", "qwen2-1.5b")  # the first is the default model's
_LEAST_CALLS = 5
_ENOUGH_S = 0.03
_MOST_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSettings:
    """Which ops (all that have a builder when empty), of which shapes, at how many rows."""

    ops: tuple[str, ...] = ()
    shapes: tuple[str, ...] = DEFAULT_SHAPES
    rows: tuple[int, ...] = ROWS
    threads: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResult:
    """One job's median time, and torch's for the same; `native` says that a kernel of ours ran."""

    op: str
    shape: str
    what: str
    rows: int
    seconds: float
    torch_seconds: float | None
    bytes_read: int
    operations: int
    kind: str
    native: bool

    @property
    def gb_per_s(self) -> float:
        """Billions of bytes of weights, cache or rows read per second."""
        return self.bytes_read / self.seconds / 1e9

    @property
    def gop_per_s(self) -> float:
        """Billions of operations per second, two for each multiply-and-add."""
        return self.operations / self.seconds / 1e9

    def share(self, ceilings: Ceilings) -> float:
        """Of the ceiling that is nearer: reads or products."""
        most = ceilings.of(self.kind) or ceilings.fp32
        return max(self.gb_per_s / ceilings.read, self.gop_per_s / most)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """Everything measured. `not_benched` are ops without a builder, `failed` says why one broke."""

    machine: str
    variant: str
    threads: int
    ceilings: Ceilings | None
    results: list[KernelResult]
    not_benched: tuple[str, ...]
    failed: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data for programs."""
        return {
            "bench": "kernels",
            "qwenkit": qwenkit.__version__,
            "machine": self.machine,
            "variant": self.variant,
            "threads": self.threads,
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            "results": [
                asdict(r)
                | {
                    "gb_per_s": r.gb_per_s,
                    "gop_per_s": r.gop_per_s,
                    "share": None if self.ceilings is None else r.share(self.ceilings),
                }
                for r in self.results
            ],
            "not_benched": list(self.not_benched),
            "failed": self.failed,
        }


def all_ops() -> tuple[str, ...]:
    """The names of every op that there is."""
    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"{ops.__name__}.{module.name}")
    return tuple(sorted(OPS))


def measure_kernels(
    settings: KernelSettings, *, progress: Callable[[str, float], None] | None = None
) -> KernelReport:
    """Time the ops' jobs. Raises UsageError for an op or a shape that is not there.

    An op whose job raises is reported with its error, and the others go on.
    """
    known = all_ops()
    for name in settings.ops:
        if name not in known:
            raise UsageError(f"op: got {name!r}. {suggest(name, known)}")
    configs = {name: shape(name) for name in settings.shapes}
    info = cpu.register(threads=settings.threads)
    torch.set_num_threads(settings.threads)
    ceilings = None
    with suppress(KernelError):  # no compiler: figures without their shares
        ceilings = measure_ceilings(settings.threads)
    wanted = settings.ops or known
    results: list[KernelResult] = []
    failed: dict[str, str] = {}
    plan = [(op, name) for op in wanted if op in BUILDERS for name in configs]
    for number, (op, name) in enumerate(plan):
        if progress is not None:
            progress(f"{op}, {name}", number / len(plan))
        try:
            for job in BUILDERS[op](configs[name], settings.rows):
                results.append(_measure(op, name, job))
        except (TypeError, ValueError, RuntimeError, KernelError) as error:
            failed[op] = f"{type(error).__name__}: {error}"
    return KernelReport(
        machine=machine(),
        variant=info.variant or "torch references",
        threads=settings.threads,
        ceilings=ceilings,
        results=results,
        not_benched=tuple(op for op in wanted if op not in BUILDERS),
        failed=failed,
    )


def _measure(op: str, name: str, job: Job) -> KernelResult:
    call = OPS[op]
    with torch.inference_mode():
        seconds = _median_seconds([_call(call, given) for given in job.calls])
        torch_seconds = None if job.torch_calls is None else _median_seconds(job.torch_calls)
    return KernelResult(
        op=op,
        shape=name,
        what=job.what,
        rows=job.rows,
        seconds=seconds,
        torch_seconds=torch_seconds,
        bytes_read=job.bytes_read,
        operations=job.operations,
        kind=job.kind,
        native="cpu" in call.backends,
    )


def _call(operator: Callable[..., Any], given: Sequence[Any]) -> Callable[[], Any]:
    return lambda: operator(*given)


def _median_seconds(calls: Iterable[Callable[[], Any]]) -> float:
    """Of calls that go round, after one that warms up."""
    around = cycle(calls)
    next(around)()
    times: list[float] = []
    begin_s = time.perf_counter()
    for call in around:
        start_s = time.perf_counter()
        call()
        end_s = time.perf_counter()
        times.append(end_s - start_s)
        spent_s = end_s - begin_s
        if (len(times) >= _LEAST_CALLS and spent_s > _ENOUGH_S) or spent_s > _MOST_S:
            break
    return statistics.median(times)
