"""What a server says of itself at /metrics, and what must be as before once all is over."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass

from qwenkit.bench.http_client import Target, ask
from qwenkit.bench.server_process import ServerProcess
from qwenkit.errors import QwenkitError

METRICS = "/metrics"
# Of a server at rest these are 0.
AT_REST = ("qwenkit_engine_running", "qwenkit_engine_waiting", "qwenkit_answers")
_FREE, _TOTAL = "qwenkit_engine_free_blocks", "qwenkit_engine_total_blocks"
_OURS = 1  # the connection that asked for the metrics may still be there
_POOL = 8  # threads of Python's pool for blocking work, which are made when they are needed
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(\{[^}]*\})?\s+([-+.\w]+)", re.MULTILINE)


async def gauges(target: Target) -> dict[str, float]:
    """Every sample by its name, of several labels the sum. Raises QwenkitError without metrics."""
    answer = await ask(target, METRICS, method="GET", timeout_s=10.0)
    if answer.status != 200:
        raise QwenkitError(f"{METRICS}: {answer.shown}")
    found: dict[str, float] = {}
    for name, _, value in _SAMPLE.findall(answer.body.decode()):
        found[name] = found.get(name, 0.0) + float(value)
    return found


@dataclass(frozen=True, slots=True)
class Rest:
    """A server's resources while it has nothing to do."""

    open_files: int
    threads: int

    @classmethod
    def of(cls, server: ServerProcess) -> Rest:
        """Now."""
        return cls(server.open_files(), server.threads())


async def time_to_rest(server: ServerProcess, before: Rest, within_s: float) -> tuple[float, str]:
    """Seconds until everything is as it was before, and what is not; empty when all is."""
    start_s = time.perf_counter()
    while True:
        wrong = await _not_at_rest(server, before)
        passed_s = time.perf_counter() - start_s
        if not wrong or passed_s > within_s:
            return passed_s, wrong
        await asyncio.sleep(0.05)


async def _not_at_rest(server: ServerProcess, before: Rest) -> str:
    values = await gauges(server.target)
    missing = [name for name in (*AT_REST, _FREE, _TOTAL) if name not in values]
    if missing:
        return f"no metric {', '.join(missing)}"
    wrong = [f"{name} {values[name]:g}" for name in AT_REST if values[name]]
    taken = values[_TOTAL] - values[_FREE]
    if taken:
        wrong.append(f"{taken:g} blocks of the cache")
    now = Rest.of(server)
    if now.open_files > before.open_files + _OURS:
        wrong.append(f"open files {before.open_files} -> {now.open_files}")
    if now.threads > before.threads + _POOL:
        wrong.append(f"threads {before.threads} -> {now.threads}")
    return ", ".join(wrong)
