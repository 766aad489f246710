"""The block pool: every block is free or held, and counted."""

from __future__ import annotations

import pytest

from qwenkit.engine.blocks import BlockPool


def test_the_lowest_free_blocks_are_handed_out_in_a_row() -> None:
    pool = BlockPool(8)
    first, second = pool.allocate(3), pool.allocate(2)
    assert (first, second, pool.free_blocks) == ([0, 1, 2], [3, 4], 3)
    pool.release(first)
    assert pool.allocate(4) == [0, 1, 2, 5]


def test_a_shared_block_is_free_only_when_the_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.share(blocks[:1])
    assert [pool.references(block) for block in blocks] == [2, 1]
    pool.release(blocks)
    assert pool.free_blocks == 1
    pool.release(blocks[:1])
    assert pool.free_blocks == 2
    assert pool.references(0) == 0


def test_miscounting_is_an_error_at_once() -> None:
    pool = BlockPool(2)
    with pytest.raises(RuntimeError, match="3 blocks while 2"):
        pool.allocate(3)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(RuntimeError, match="more often than taken"):
        pool.release([block])
    with pytest.raises(RuntimeError, match="cannot be shared"):
        pool.share([block])
    assert pool.free_blocks == 2
