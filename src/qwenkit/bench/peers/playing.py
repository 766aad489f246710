"""Plays a load to an engine that decodes what it is told to: in slots, each filled again as soon as
its request is done, or in batches that end with their longest request.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwenkit.bench.peers.spec import Arrival, Load, prompt_ids

Entry = tuple[int, int, int, bool]  # id, position, slot, whether the next id is wanted
Clock = Callable[[], float]
Sleep = Callable[[float], None]


@dataclass(slots=True)
class _Running:
    """A request in a slot: `done` of its prompt's ids are computed, then `last` continues it."""

    number: int
    prompt: list[int]
    tokens: int
    done: int = 0
    last: int = 0


def play_in_slots(
    load: Load,
    decode: Callable[[list[Entry]], Sequence[int]],
    release: Callable[[int], None],
    *,
    slots: int,
    step_tokens: int,
    vocab_size: int,
    clock: Clock = time.perf_counter,
    sleep: Sleep = time.sleep,
) -> list[list[float]]:
    """Times as of `spec.Server.play`. `decode` computes at most `step_tokens` entries and gives the
    next id of those that want it; `release` empties a slot. Prompts are computed beside decodes.
    """
    times: list[list[float]] = [[] for _ in load.arrivals]
    waiting = deque(sorted(enumerate(load.arrivals), key=lambda pair: pair[1].at_s))
    running: dict[int, _Running] = {}
    start_s = clock()
    while waiting or running:
        while waiting and len(running) < slots and waiting[0][1].at_s <= clock() - start_s:
            number, arrival = waiting.popleft()
            slot = next(slot for slot in range(slots) if slot not in running)
            ids = prompt_ids(arrival.prompt_tokens, vocab_size, number)
            running[slot] = _Running(number, ids, arrival.tokens)
        if not running:
            sleep(max(0.0, waiting[0][1].at_s - (clock() - start_s)))
            continue
        entries = _entries(running, times, step_tokens)
        wanted = [slot for _, _, slot, is_wanted in entries if is_wanted]
        for slot, chosen in zip(wanted, decode(entries), strict=True):
            request = running[slot]
            request.last = chosen
            times[request.number].append(clock() - start_s)
            if len(times[request.number]) == request.tokens:
                del running[slot]
                release(slot)
    return times


def _entries(
    running: dict[int, _Running], times: list[list[float]], step_tokens: int
) -> list[Entry]:
    """One token of whoever decodes, and of the prompts what fits beside them."""
    entries: list[Entry] = []
    for slot, request in running.items():
        made = len(times[request.number])
        if made:
            entries.append((request.last, len(request.prompt) + made - 1, slot, True))
    for slot, request in running.items():
        stop = min(len(request.prompt), request.done + step_tokens - len(entries))
        for position in range(request.done, stop):
            is_last = position == len(request.prompt) - 1
            entries.append((request.prompt[position], position, slot, is_last))
        request.done = max(request.done, stop)
    return entries


def play_in_batches(
    load: Load,
    begin: Callable[[list[list[int]]], None],
    advance: Callable[[], None],
    *,
    most: int,
    vocab_size: int,
    clock: Clock = time.perf_counter,
    sleep: Sleep = time.sleep,
) -> list[list[float]]:
    """Times as of `spec.Server.play`. `begin` gives the first token of at most `most` prompts,
    `advance` the next one of each; who is done keeps its row until all of them are.
    """
    times: list[list[float]] = [[] for _ in load.arrivals]
    waiting = deque(sorted(enumerate(load.arrivals), key=lambda pair: pair[1].at_s))
    start_s = clock()
    while waiting:
        sleep(max(0.0, waiting[0][1].at_s - (clock() - start_s)))
        batch: list[tuple[int, Arrival]] = []
        while waiting and len(batch) < most and waiting[0][1].at_s <= clock() - start_s:
            batch.append(waiting.popleft())
        if not batch:
            continue  # it slept a little less than it was asked to
        begin([prompt_ids(arrival.prompt_tokens, vocab_size, n) for n, arrival in batch])
        for step in range(max(arrival.tokens for _, arrival in batch)):
            if step:
                advance()
            now_s = clock() - start_s
            for number, arrival in batch:
                if step < arrival.tokens:
                    times[number].append(now_s)
    return times
