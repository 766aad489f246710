"""Our server over HTTP: beside other servers and engines, and beside our own engine without HTTP.

Everything takes turns (A B A B) in processes of its own, warm, at each number of clients. vLLM is
asked over HTTP as its users ask it; llama.cpp decodes in as many slots as there are clients, with
no server around it, which is the most that any server of its can do.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from qwenkit.bench.environments import launch_prefix, python_for
from qwenkit.bench.http_client import Target
from qwenkit.bench.http_load import (
    LevelResult,
    LoadShape,
    SecondTurn,
    TurnResult,
    measure_second_turn,
    run_turn,
)
from qwenkit.bench.peers.spec import Arrival, Load, Options
from qwenkit.bench.process import WorkerProcess
from qwenkit.bench.server_process import HOST, ServerProcess, free_port, status_bytes
from qwenkit.bench.sources import OURS, launch_for
from qwenkit.bench.speed import Progress, SpeedSettings
from qwenkit.errors import QwenkitError

IN_PROCESS = "qwenkit, no HTTP"
PEERS = ("llama.cpp", "vllm")  # those that can be compared here
_VLLM_READY = "/health"
_STARTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """`speed` says on what, beside whom and how many turns. `default_model` is started to see how
    long that takes.
    """

    speed: SpeedSettings
    clients: tuple[int, ...] = (1, 4, 16)
    prompt_tokens: int = 64
    answer_tokens: int = 64
    requests_each: int = 2
    conversations: int = 5
    conversation_words: int = 400
    default_model: Path | None = None


@dataclass(slots=True, kw_only=True)
class HttpReport:
    """`levels` has the turns by number of clients and by engine; `failed` why an engine is missing;
    `versions` what it is.
    """

    levels: dict[int, dict[str, LevelResult]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    second_turn: SecondTurn | None = None
    server_bytes: int = 0
    engine_bytes: int = 0
    start_s: list[float] = field(default_factory=list)

    def ratio(self, clients: int, engine: str) -> float | None:
        """Our server's speed over another's: the median over turns that followed each other."""
        level = self.levels.get(clients, {})
        if engine not in level or OURS not in level:
            return None
        pairs = zip(level[OURS].turns, level[engine].turns, strict=False)
        ratios = [a.tokens_per_second / b.tokens_per_second for a, b in pairs if b.tokens]
        return statistics.median(ratios) if ratios else None

    @property
    def over_bytes(self) -> int:
        """What an idle server has resident beyond an idle engine."""
        return self.server_bytes - self.engine_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "versions": self.versions,
            "failed": self.failed,
            "levels": [
                {
                    "clients": clients,
                    "engines": {name: each.to_json() for name, each in engines.items()},
                    "qwenkit_ratios": {name: self.ratio(clients, name) for name in engines},
                }
                for clients, engines in self.levels.items()
            ],
            "second_turn": None if self.second_turn is None else self.second_turn.to_json(),
            "idle_server_bytes": self.server_bytes,
            "idle_engine_bytes": self.engine_bytes,
            "start_s": self.start_s,
        }


class Participant(Protocol):
    """Whoever takes turns."""

    async def turn(self, clients: int, number: int) -> TurnResult:
        """One closed loop of so many clients."""


@dataclass(frozen=True, slots=True)
class OverHttp:
    """A server, through its OpenAI API."""

    target: Target
    shape: LoadShape

    async def turn(self, clients: int, number: int) -> TurnResult:
        """See `http_load.run_turn`."""
        return await run_turn(self.target, self.shape, clients, turn=number)


@dataclass(frozen=True, slots=True)
class InProcess:
    """An engine that is given the same requests without HTTP."""

    worker: WorkerProcess
    shape: LoadShape

    async def turn(self, clients: int, number: int) -> TurnResult:
        """See `peers.spec.Server.play`."""
        shape = self.shape
        arrival = Arrival(0.0, shape.prompt_tokens, shape.answer_tokens)
        load = Load((arrival,) * (clients * shape.requests_each), at_most=clients)
        times: list[list[float]] = self.worker.measure(load)["times"]
        result = TurnResult(requests=len(times), seconds=max(own[-1] for own in times))
        for own in times:
            result.tokens += len(own)
            result.between_s += [later - sooner for sooner, later in pairwise(own)]
        return result


def measure_http(settings: HttpSettings, *, progress: Progress) -> HttpReport:
    """All of it. A peer that fails is reported with its reason. Raises QwenkitError when our own
    server or engine fails.
    """
    return asyncio.run(_measure(settings, progress))


async def _measure(settings: HttpSettings, progress: Progress) -> HttpReport:
    report = HttpReport()
    async with AsyncExitStack() as stack:
        server, shape = await _our_server(stack, settings, report, progress)
        participants: dict[str, Participant] = {OURS: OverHttp(server.target, shape)}
        worker = _worker(stack, OURS, settings, max(settings.clients), progress)
        report.versions[IN_PROCESS] = " ".join(worker.hello())
        participants[IN_PROCESS] = InProcess(worker, shape)
        await participants[OURS].turn(1, 0)
        await participants[IN_PROCESS].turn(1, 0)
        report.server_bytes = server.resident_bytes()
        report.engine_bytes = status_bytes(worker.pid, "VmRSS")
        if "vllm" in settings.speed.peers:
            try:
                participants["vllm"] = await _vllm(stack, settings, shape, report, progress)
            except QwenkitError as error:
                report.failed["vllm"] = str(error)
        await _levels(settings, participants, shape, report, progress)
        progress("second turns", 0.95)
        # Random weights know no chat format.
        is_random = settings.speed.source.model is None
        turns = shape if is_random else replace(shape, vocab_size=None)
        report.second_turn = await measure_second_turn(
            server.target,
            turns,
            conversations=settings.conversations,
            prompt_words=settings.conversation_words,
        )
    if settings.default_model is not None:
        progress("starts of the default model", 0.98)
        report.start_s = await start_times(settings.default_model, settings.speed.threads)
    return report


async def _levels(
    settings: HttpSettings,
    participants: dict[str, Participant],
    shape: LoadShape,
    report: HttpReport,
    progress: Progress,
) -> None:
    for done, clients in enumerate(settings.clients):
        async with AsyncExitStack() as stack:
            present = dict(participants)
            if "llama.cpp" in settings.speed.peers and "llama.cpp" not in report.failed:
                try:
                    worker = _worker(stack, "llama.cpp", settings, clients, progress)
                    report.versions["llama.cpp"] = " ".join(worker.hello())
                    present["llama.cpp"] = InProcess(worker, shape)
                except QwenkitError as error:
                    report.failed["llama.cpp"] = str(error)
            level = {name: LevelResult(clients=clients) for name in present}
            report.levels[clients] = level
            for turn in range(settings.speed.turns + 1):
                for name, participant in present.items():
                    progress(f"{clients} clients, {name}", done / len(settings.clients))
                    result = await participant.turn(clients, turn + 1)
                    if turn:  # the first one warms
                        level[name].turns.append(result)


async def _our_server(
    stack: AsyncExitStack, settings: HttpSettings, report: HttpReport, progress: Progress
) -> tuple[ServerProcess, LoadShape]:
    progress("starting our server", 0.0)
    speed = settings.speed
    options = Options(threads=speed.threads, most_prompt_tokens=1, most_positions=1)
    launch = launch_for(
        OURS, sys.executable, speed.source, options, speed.cache / "bench", progress
    )
    server = stack.enter_context(
        ServerProcess.ours(launch.model, *_own_options(settings), "--threads", str(speed.threads))
    )
    await server.wait_until_ready()
    shape = LoadShape(
        prompt_tokens=settings.prompt_tokens,
        answer_tokens=settings.answer_tokens,
        requests_each=settings.requests_each,
        vocab_size=_smallest_vocabulary(speed),
        ignore_eos=True,
    )
    report.versions[OURS] = f"over HTTP, {speed.source.name}"
    return server, shape


def _smallest_vocabulary(speed: SpeedSettings) -> int:
    """Ids below this are ordinary tokens of any model that is measured."""
    return 32_000 if speed.source.model is not None else 150_000


def _own_options(settings: HttpSettings) -> list[str]:
    weights = settings.speed.source.weights
    if weights is None:
        return []
    options = ["--weights", weights.name]
    if weights.name in ("int4", "int8"):
        options += ["--group-size", str(weights.group_size)]
    return options if weights.head is None else [*options, "--head-weights", weights.head]


def _worker(
    stack: AsyncExitStack, engine: str, settings: HttpSettings, clients: int, progress: Progress
) -> WorkerProcess:
    """An engine that plays loads, ready."""
    progress(f"loading {engine}", 0.0)
    speed = settings.speed
    python = sys.executable
    if engine != OURS:
        python = speed.peer_python or python_for(
            engine,
            speed.cache / "peers",
            make=speed.make_peers,
            progress=lambda what: progress(what, 0.0),
        )
    options = Options(
        threads=speed.threads,
        most_prompt_tokens=settings.prompt_tokens,
        most_positions=settings.prompt_tokens + settings.answer_tokens,
        most_streams=clients,
        serves=True,
    )
    launch = launch_for(engine, python, speed.source, options, speed.cache / "bench", progress)
    return stack.enter_context(WorkerProcess(launch))


async def _vllm(
    stack: AsyncExitStack,
    settings: HttpSettings,
    shape: LoadShape,
    report: HttpReport,
    progress: Progress,
) -> Participant:
    speed = settings.speed
    progress("starting vLLM", 0.0)
    python = speed.peer_python or python_for(
        "vllm",
        speed.cache / "peers",
        make=speed.make_peers,
        progress=lambda what: progress(what, 0.0),
    )
    options = Options(threads=speed.threads, most_prompt_tokens=1, most_positions=1)
    launch = launch_for("vllm", python, speed.source, options, speed.cache / "bench", progress)
    port = free_port()
    command = [
        *launch_prefix("vllm", speed.threads),
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(launch.model)),
        *("--served-model-name", shape.model, "--host", HOST, "--port", str(port)),
        *("--dtype", "bfloat16", "--enforce-eager", "--no-enable-prefix-caching"),
        *("--max-model-len", "2048", "--max-num-seqs", str(max(settings.clients))),
    ]
    target = Target(host=HOST, port=port)
    server = stack.enter_context(ServerProcess(command, target))
    await server.wait_until_ready(_VLLM_READY, within_s=300.0)
    weights = speed.source.peer_weights()
    report.versions["vllm"] = f"over HTTP, {'as stored' if weights is None else weights.label}"
    return OverHttp(target, shape)


async def start_times(model: Path, threads: int) -> list[float]:
    """Seconds from the start of the process to ready, of some starts after one that warms."""
    times = []
    for turn in range(_STARTS + 1):
        with ServerProcess.ours(model, "--threads", str(threads)) as server:
            ready_s = await server.wait_until_ready()
        if turn:
            times.append(ready_s)
    return times


async def measure_url(
    target: Target,
    shape: LoadShape,
    clients: Sequence[int],
    *,
    turns: int,
    conversations: int,
    progress: Progress,
) -> tuple[list[LevelResult], SecondTurn | None]:
    """Any OpenAI server at each number of clients, warm, and its second turns where it can chat.

    Raises QwenkitError where it answers nothing.
    """
    levels = []
    progress("warming", 0.0)
    warm = await run_turn(target, replace(shape, requests_each=1), 1)
    if not warm.tokens:
        reason = warm.errors[0] if warm.errors else "no text came"
        raise QwenkitError(f"{target.url}{shape.path}: {reason}")
    for done, count in enumerate(clients):
        level = LevelResult(clients=count)
        for turn in range(turns):
            progress(f"{count} clients, turn {turn + 1} of {turns}", done / len(clients))
            level.turns.append(await run_turn(target, shape, count, turn=turn + 1))
        levels.append(level)
    second = None
    if shape.vocab_size is None and conversations:
        progress("second turns", 0.95)
        second = await measure_second_turn(
            target, shape, conversations=conversations, prompt_words=400
        )
    return levels, second
