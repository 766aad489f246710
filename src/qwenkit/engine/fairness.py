"""Who goes first and who yields, between sequences of several priorities and clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from collections.abc import Sequence as Several

from qwenkit.engine.blocks import BlockPool
from qwenkit.engine.request import Sequence

_UNNOTICED = 8  # sequences that decode together in hardly more time than one


def runs_already(sequence: Sequence, running: Collection[Sequence]) -> bool:
    """True if the sequence's client has one of at least its priority running."""
    return any(s.client == sequence.client and s.priority >= sequence.priority for s in running)


def who_yields(
    sequence: Sequence,
    running: Several[Sequence],
    max_sequences: int,
    pool: BlockPool,
    needed: int,
    kept: Collection[int],
) -> list[Sequence] | None:
    """Who of `running` must yield so that a waiting sequence can start, with `needed` free blocks,
    of which `kept` are not won by somebody's yielding, and one left for each of the others to grow
    into. None if even that would not do.
    """
    yielding: list[Sequence] = []
    while True:
        others = [s for s in running if s not in yielding]
        held = Counter(block for s in yielding for block in s.blocks)
        won = sum(
            pool.references(block) == count and block not in kept for block, count in held.items()
        )
        has_room = needed + len(others) <= pool.free_blocks + won
        if has_room and len(others) < max_sequences:
            return yielding
        candidates = yielding_to(sequence, others)
        if not candidates:
            return None
        yielding.append(last_to_keep(candidates))


def yielding_to(sequence: Sequence, running: Several[Sequence]) -> list[Sequence]:
    """Those of `running` that lose their place to a waiting sequence before it has to wait."""
    lower = [s for s in running if s.priority < sequence.priority]
    if lower:
        return lower
    counts = Counter(s.client for s in running)
    if counts[sequence.client] or max(counts.values(), default=0) < 2:
        return []
    return [s for s in running if counts[s.client] > 1 and s.priority == sequence.priority]


def last_to_keep(running: Collection[Sequence]) -> Sequence:
    """Who yields first: of the lowest priority, of the client that runs most, the youngest."""
    counts = Counter(s.client for s in running)
    return min(running, key=lambda s: (s.priority, -counts[s.client], -s.arrival))


def who_pauses(running: Collection[Sequence], budget: int) -> set[str]:
    """Who sits one step out, by request, so that a client that has nothing else running waits for
    its first token no longer than its prompt takes: what decodes for a client with more than
    `_UNNOTICED` sequences, where a newcomer of another client, of no lower priority, has at most
    `budget` tokens to go.
    """
    counts = Counter(s.client for s in running)
    newcomers = [s.priority for s in running if 1 < s.remaining <= budget and counts[s.client] == 1]
    if not newcomers:
        return set()
    return {
        s.request_id
        for s in running
        if s.remaining == 1 and counts[s.client] > _UNNOTICED and s.priority <= max(newcomers)
    }


def share_prompts(prompts: Several[tuple[Sequence, int]], budget: int) -> dict[str, int]:
    """How many of `budget` tokens each prompt gets, by request: higher priorities first, then even
    shares for the clients, of which none gets more than it has use for; a client's oldest first.

    Beside each prompt stands the most that it may get.
    """
    shares = dict.fromkeys((sequence.request_id for sequence, _ in prompts), 0)
    for priority in sorted({sequence.priority for sequence, _ in prompts}, reverse=True):
        uses: dict[str, list[tuple[str, int]]] = {}
        for sequence, most in prompts:
            if sequence.priority == priority:
                uses.setdefault(sequence.client, []).append((sequence.request_id, most))
        by_use = sorted(uses.values(), key=lambda each: sum(most for _, most in each))
        for left, each in zip(range(len(by_use), 0, -1), by_use, strict=True):
            share = -(-budget // left)
            for name, most in each:
                shares[name] = taken = min(most, share)
                share -= taken
                budget -= taken
    return shares
