"""The order in which waiting sequences start: by priority, then fairly between clients.

Fairness is by a virtual counter of tokens for each client (Sheng et al., OSDI 2024, arXiv
2401.00588): who has been served least comes first, and who comes anew starts just before the least
served, so that idle time is not saved up. Within one client and priority the order is that of
arrival.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator

from qwenkit.engine.request import Sequence


class Line:
    """Waiting sequences, and what every client with sequences, waiting or not, has been served."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Sequence]] = {}  # by client, each list in order
        self._served_tokens: dict[str, int] = {}
        self._members: dict[str, int] = {}  # sequences in the engine, by client
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def enter(self, sequence: Sequence) -> None:
        """Count a new sequence among its client's; `add` makes it wait."""
        client = sequence.client
        if client not in self._members:
            self._members[client] = 0
            self._served_tokens[client] = min(self._served_tokens.values(), default=1) - 1
        self._members[client] += 1

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence that does not wait, and with its last one the client."""
        client = sequence.client
        self._members[client] -= 1
        if not self._members[client]:
            del self._members[client], self._served_tokens[client]

    def add(self, sequence: Sequence) -> None:
        """Make a sequence wait, at the place that its arrival gives it."""
        insort(self._waiting.setdefault(sequence.client, []), sequence, key=_place)
        self._count += 1

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out."""
        waiting = self._waiting[sequence.client]
        waiting.remove(sequence)
        self._count -= 1
        if not waiting:
            del self._waiting[sequence.client]

    def charge(self, sequence: Sequence) -> None:
        """Let the client pay for a sequence's tokens, and for none a second time."""
        self._served_tokens[sequence.client] += max(0, len(sequence.tokens) - sequence.charged)
        sequence.charged = max(sequence.charged, len(sequence.tokens))

    def rank(self, sequence: Sequence) -> tuple[int, int, int]:
        """Sorts sequences of any client: who comes first is served first."""
        return -sequence.priority, self._served_tokens[sequence.client], sequence.arrival

    def in_order(self) -> Iterator[Sequence]:
        """The waiting sequences, first the one that starts next; those given may be removed while
        this runs.
        """
        lists = {client: list(waiting) for client, waiting in self._waiting.items()}
        heads = [(self.rank(waiting[0]), client, 0) for client, waiting in lists.items()]
        heapq.heapify(heads)
        while heads:
            _, client, index = heads[0]
            yield lists[client][index]
            if index + 1 < len(lists[client]):
                after = self.rank(lists[client][index + 1]), client, index + 1
                heapq.heapreplace(heads, after)
            else:
                heapq.heappop(heads)


def _place(sequence: Sequence) -> tuple[int, int]:
    return -sequence.priority, sequence.arrival
