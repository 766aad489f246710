"""The block pool: every block is free or held, and counted; content is kept and found by name."""

from __future__ import annotations

import pytest

from qwenkit.engine.blocks import BlockPool, first_name, next_name


def test_the_lowest_free_blocks_are_handed_out_in_a_row() -> None:
    pool = BlockPool(8)
    first, second = pool.allocate(3), pool.allocate(2)
    assert (first, second, pool.free_blocks) == ([0, 1, 2], [3, 4], 3)
    pool.release(first)
    assert pool.allocate(4) == [0, 1, 2, 5]


def test_a_shared_block_is_free_only_when_the_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.hold(blocks[:1])
    assert [pool.references(block) for block in blocks] == [2, 1]
    pool.release(blocks)
    assert pool.free_blocks == 1
    pool.release(blocks[:1])
    assert pool.free_blocks == 2
    assert pool.references(0) == 0


def test_content_is_found_by_its_name_until_the_space_is_needed() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    for block, name in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.give_name(block, name)
    pool.release(blocks)
    assert pool.free_blocks == 4
    assert pool.find((b"a", b"b", b"x", b"c")) == blocks[:2]  # what follows a gap is of no use
    assert pool.kept_among((*blocks, 3)) == 3
    assert pool.allocate(2) == [3, blocks[2]]  # the empty one, then the last of the released
    assert pool.find((b"a", b"b", b"c")) == blocks[:2]
    pool.hold(blocks[:1])
    assert (pool.free_blocks, pool.kept_among(blocks)) == (1, 1)
    pool.forget()
    assert pool.find((b"a", b"b")) == blocks[:1]
    assert pool.free_blocks == 1


def test_a_name_stays_with_the_block_that_had_it_first() -> None:
    pool = BlockPool(3)
    first, second, third = pool.allocate(3)
    pool.give_name(first, b"a")
    pool.give_name(second, b"a")
    pool.give_name(first, b"b")
    assert (pool.find((b"a",)), pool.find((b"b",))) == ([first], [])
    pool.release([second])
    assert pool.kept_among((second,)) == 0
    pool.drop_names((first, third))
    assert pool.find((b"a",)) == []


def test_a_name_stands_for_everything_up_to_the_end_of_the_block() -> None:
    roots = [first_name(None), first_name("salt"), first_name(None, "salt")]
    names = {next_name(root, tokens) for root in roots for tokens in ((1, 2), (2, 1), (1, 2, 0))}
    assert len(names) == 9
    assert next_name(roots[0], (1, 2)) == next_name(roots[0], [1, 2])


def test_miscounting_is_an_error_at_once() -> None:
    pool = BlockPool(2)
    with pytest.raises(RuntimeError, match="3 blocks while 2"):
        pool.allocate(3)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(RuntimeError, match="more often than taken"):
        pool.release([block])
    assert pool.free_blocks == 2
