"""The pool of KV cache blocks: who holds them, and what those hold that nobody needs any more.

Counts and names only; the memory is in `kv`. A block may be held by several sequences with the same
beginning. When the last of them lets it go it keeps its content, if that has a name, until the
space is needed: a later sequence that begins the same takes it as it is (arXiv 2309.06180, 4.4).
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

Name = bytes  # of a block's content: it stands for all tokens up to the block's end


def first_name(*facts: object) -> Name:
    """What stands before the first block: all that keys and values depend on beside the tokens."""
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()


def next_name(before: Name, tokens: Sequence[int]) -> Name:
    """The name of a block of `tokens` behind a block of the name `before`. Names of 128 bits are
    cryptographic hashes, so that nobody can make two prompts that share one.
    """
    content = before + array("q", tokens).tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


class BlockPool:
    """Blocks 0 to `num_blocks` - 1, all free and empty at first.

    The lowest empty block is handed out first: pages of the cache that were never used stay
    untouched, and a sequence that runs alone has its blocks in a row, which is read without a copy.
    Then go those that have been free for longest.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._empty = list(range(num_blocks))  # a heap
        self._kept: OrderedDict[int, None] = OrderedDict()  # free with content, longest first
        self._references = [0] * num_blocks
        self._names: list[Name | None] = [None] * num_blocks
        self._by_name: dict[Name, int] = {}

    @property
    def free_blocks(self) -> int:
        """How many blocks nobody holds, whether or not they keep something."""
        return len(self._empty) + len(self._kept)

    def references(self, block: int) -> int:
        """How many sequences hold `block`."""
        return self._references[block]

    def find(self, names: Iterable[Name]) -> list[int]:
        """The blocks that have the contents `names`, up to the first that no block has."""
        found = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def kept_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are free: holding them leaves so many fewer to allocate."""
        return sum(block in self._kept for block in blocks)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks. The caller has made sure that there are so many."""
        if count > self.free_blocks:
            raise RuntimeError(f"asked for {count} blocks while {self.free_blocks} are free")
        blocks = [self._take() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """Note one more holder of each of `blocks`, which `find` gave."""
        for block in blocks:
            if self._references[block] == 0:
                del self._kept[block]
            self._references[block] += 1

    def give_name(self, block: int, name: Name) -> None:
        """Say what a held block holds, once it is full. What another block holds already, or what
        was said before, changes nothing.
        """
        if self._names[block] is None and name not in self._by_name:
            self._names[block] = name
            self._by_name[name] = block

    def drop_names(self, blocks: Iterable[int]) -> None:
        """Let nobody else begin with `blocks`, whose content proved to be no good."""
        for block in blocks:
            name = self._names[block]
            if name is not None:
                del self._by_name[name]
                self._names[block] = None

    def release(self, blocks: Sequence[int]) -> None:
        """Note one holder fewer of each of `blocks`, which are one sequence's, in its order. The
        last ones are used again first: the beginning is what others may share.
        """
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise RuntimeError(f"block {block} was released more often than taken")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._names[block] is None:
                    heapq.heappush(self._empty, block)
                else:
                    self._kept[block] = None

    def forget(self) -> None:
        """Empty the free blocks that keep something."""
        while self._kept:
            heapq.heappush(self._empty, self._drop_oldest())

    def _take(self) -> int:
        return heapq.heappop(self._empty) if self._empty else self._drop_oldest()

    def _drop_oldest(self) -> int:
        block, _ = self._kept.popitem(last=False)
        name = self._names[block]
        assert name is not None, "only blocks with a name are kept"
        del self._by_name[name]
        self._names[block] = None
        return block
