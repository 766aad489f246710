"""The pool of KV cache blocks: which are free, and how many sequences hold each of the others.

Counts only; the memory is in `kv`. A block may be held by several sequences (equal prefixes); it is
free again when the last of them lets it go.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class BlockPool:
    """Blocks 0 to `num_blocks` - 1, all free at first.

    The lowest free block is handed out first: pages of the cache that were never used stay
    untouched, and a sequence that runs alone has its blocks in a row, which is read without a copy.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))  # a heap
        self._references = [0] * num_blocks

    @property
    def free_blocks(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free)

    def references(self, block: int) -> int:
        """How many sequences hold `block`."""
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks. The caller has made sure that there are so many."""
        if count > len(self._free):
            raise RuntimeError(f"asked for {count} blocks while {len(self._free)} are free")
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Note one more holder of each of `blocks`, which somebody holds already."""
        for block in blocks:
            if self._references[block] < 1:
                raise RuntimeError(f"block {block} is free and cannot be shared")
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Note one holder fewer of each of `blocks`."""
        for block in blocks:
            if self._references[block] < 1:
                raise RuntimeError(f"block {block} was released more often than taken")
            self._references[block] -= 1
            if self._references[block] == 0:
                heapq.heappush(self._free, block)
