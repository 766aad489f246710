"""Equal beginnings: which blocks hold what a sequence begins with, and which are about to."""

from __future__ import annotations

from qwenkit.engine.blocks import BlockPool, Name, next_name
from qwenkit.engine.request import Sequence


class Prefixes:
    """Finds and names what full blocks of `pool` hold; `enabled` False: nothing is ever shared."""

    def __init__(self, pool: BlockPool, block_tokens: int, *, enabled: bool) -> None:
        self._pool = pool
        self._block_tokens = block_tokens
        self._enabled = enabled
        self._coming: dict[Name, Sequence] = {}  # blocks that a running sequence is about to fill

    def find(self, sequence: Sequence) -> list[int]:
        """The blocks that hold what a sequence begins with, as far as it needs no rows of it."""
        if not self._enabled:
            return []
        return self._pool.find(self._names(sequence, sequence.first_row // self._block_tokens))

    def is_coming(self, sequence: Sequence, cached: int) -> bool:
        """True if a running sequence, no less urgent, is about to fill the block that this one,
        with `cached` blocks found, would fill first.
        """
        full = sequence.first_row // self._block_tokens
        if cached >= full or not self._enabled:
            return False
        other = self._coming.get(self._names(sequence, full)[cached])
        return other is not None and other.priority >= sequence.priority

    def expect(self, sequence: Sequence, cached: int) -> None:
        """Note that a sequence starts to fill the blocks behind its first `cached` ones."""
        if self._enabled:
            full = len(sequence.tokens) // self._block_tokens
            for name in self._names(sequence, full)[cached:]:
                self._coming.setdefault(name, sequence)

    def give_up(self, sequence: Sequence) -> None:
        """Note that a sequence has stopped: what it was about to fill is not coming."""
        for name in sequence.names:
            if self._coming.get(name) is sequence:
                del self._coming[name]

    def name_full_blocks(self, sequence: Sequence, start: int) -> None:
        """Name the blocks that became full when the tokens from `start` on were computed."""
        first, full = start // self._block_tokens, sequence.computed // self._block_tokens
        if first == full or not self._enabled:
            return
        for index, name in enumerate(self._names(sequence, full)[first:], first):
            self._pool.give_name(sequence.blocks[index], name)
            self._coming.pop(name, None)

    def _names(self, sequence: Sequence, count: int) -> list[Name]:
        """The names of a sequence's first `count` blocks, which its tokens fill."""
        size, names = self._block_tokens, sequence.names
        while len(names) < count:
            start = len(names) * size
            before = names[-1] if names else sequence.root
            names.append(next_name(before, sequence.tokens[start : start + size]))
        return names[:count]
