"""What the scheduler decides in cases made by hand; random ones are in the next file."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qwenkit.engine.blocks import BlockPool
from qwenkit.engine.plan import Plan
from qwenkit.engine.scheduler import Scheduler
from qwenkit.types.extension import Extension


def make(num_blocks: int, **sizes: Any) -> Scheduler:
    usual = {"block_tokens": 4, "max_batch_tokens": 8, "max_sequences": 4}
    return Scheduler(BlockPool(num_blocks), **(usual | sizes))


def shape(plan: Plan) -> list[tuple[str, int, int, bool]]:
    return [(c.request_id, c.start, len(c.token_ids), c.sample) for c in plan.chunks]


def execute(scheduler: Scheduler, plan: Plan, token: int = 7) -> None:
    scheduler.apply(plan, {c.request_id: (token,) for c in plan.chunks if c.sample})


def test_a_prompt_is_computed_in_chunks_while_others_decode() -> None:
    scheduler = make(32)
    scheduler.add("a", (1, 2, 3))
    plan = scheduler.schedule()
    assert shape(plan) == [("a", 0, 3, True)]
    execute(scheduler, plan)
    scheduler.add("b", tuple(range(10)))
    plan = scheduler.schedule()
    assert shape(plan) == [("a", 3, 1, True), ("b", 0, 7, False)]
    assert plan.chunks[0].token_ids == (7,)
    assert plan.chunks[1].token_ids == tuple(range(7))
    execute(scheduler, plan)
    assert shape(scheduler.schedule()) == [("a", 4, 1, True), ("b", 7, 3, True)]


def test_a_decode_behind_a_long_prompt_still_gets_its_token() -> None:
    scheduler = make(32, max_batch_tokens=4)
    scheduler.add("long", tuple(range(5)))
    scheduler.add("short", (1, 2))
    execute(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert shape(plan) == [("long", 4, 1, True), ("short", 0, 2, True)]
    execute(scheduler, plan)
    scheduler.add("third", tuple(range(100, 109)))
    assert shape(scheduler.schedule()) == [
        ("long", 5, 1, True),
        ("short", 2, 1, True),
        ("third", 0, 2, False),
    ]


def test_the_youngest_gives_up_its_blocks_and_keeps_its_place() -> None:
    scheduler = make(3, prefix_cache=False)
    for start, name in enumerate("abc"):
        scheduler.add(name, (10 * start, 2, 3))
    assert shape(scheduler.schedule()) == [("a", 0, 3, True), ("b", 0, 3, True)]
    for _ in range(2):
        execute(scheduler, scheduler.schedule())
    plan = scheduler.schedule()  # a takes the third block, so b has none left to grow into
    assert plan.preempted == ("b",)
    assert shape(plan) == [("a", 4, 1, True)]
    execute(scheduler, plan)
    scheduler.remove("a")
    plan = scheduler.schedule()  # b comes before c and is computed again, output included
    assert plan.chunks[0].request_id == "b"
    assert plan.chunks[0].token_ids == (10, 2, 3, 7, 7)
    execute(scheduler, plan)
    status = scheduler.status()
    assert (status.preemptions, status.recomputed_tokens) == (1, 4)


def test_removing_frees_the_blocks_at_once_and_apply_skips_who_left() -> None:
    scheduler = make(4)
    scheduler.add("a", tuple(range(16)))
    scheduler.add("b", (1,))
    plan = scheduler.schedule()
    assert scheduler.status().free_blocks == 0
    scheduler.remove("a")
    assert scheduler.status().free_blocks == 4
    scheduler.remove("b")
    execute(scheduler, plan)
    assert not scheduler.has_work
    assert scheduler.schedule() == Plan(())


@pytest.mark.parametrize("seed", range(5))
def test_sixty_four_requests_finish_in_a_quarter_of_the_memory_they_need(seed: int) -> None:
    generator = random.Random(seed)
    lengths = {str(i): (generator.randint(1, 200), generator.randint(1, 600)) for i in range(64)}
    demand = sum(-(-(prompt + output) // 16) for prompt, output in lengths.values())
    num_blocks = max(demand // 4, 20)
    scheduler = make(num_blocks, block_tokens=16, max_batch_tokens=128, max_sequences=64)
    for name, (prompt, _) in lengths.items():
        scheduler.add(name, tuple(range(prompt)))
    output = dict.fromkeys(lengths, 0)
    finished = []
    for _ in range(20_000):
        if not scheduler.has_work:
            break
        plan = scheduler.schedule()
        execute(scheduler, plan)
        for name in (c.request_id for c in plan.chunks if c.sample):
            output[name] += 1
            if output[name] == lengths[name][1]:
                scheduler.remove(name)
                finished.append(name)
    status = scheduler.status()
    assert sorted(finished) == sorted(lengths)
    assert status.free_blocks == num_blocks
    assert status.preemptions > 0
    assert status.recomputed_tokens < 0.5 * status.computed_tokens


def begin(scheduler: Scheduler, name: str, prompt: Any, **options: Any) -> None:
    """Add a sequence and compute its prompt to the end."""
    scheduler.add(name, tuple(prompt), **options)
    for _ in range(1000):
        plan = scheduler.schedule()
        execute(scheduler, plan)
        if any(c.request_id == name and c.sample for c in plan.chunks):
            return
    raise AssertionError(f"{name} was never computed")


def test_who_lost_its_blocks_goes_on_from_what_is_still_kept() -> None:
    scheduler = make(5, max_batch_tokens=16)
    scheduler.add("a", tuple(range(4)))
    scheduler.add("b", tuple(range(10, 18)))
    for _ in range(5):  # a grows to nine tokens, b to thirteen
        execute(scheduler, scheduler.schedule())
    plan = scheduler.schedule()  # a's ninth token needs a third block
    assert plan.preempted == ("b",)
    execute(scheduler, plan)
    scheduler.remove("a")
    plan = scheduler.schedule()
    chunk = plan.chunks[0]
    assert (chunk.request_id, chunk.start) == ("b", 8)  # the two full blocks are still there
    execute(scheduler, plan)
    assert scheduler.status().recomputed_tokens == 4


def test_a_second_turn_computes_only_its_new_tokens() -> None:
    scheduler = make(16)
    begin(scheduler, "first", range(10))  # two full blocks
    execute(scheduler, scheduler.schedule(), token=50)
    execute(scheduler, scheduler.schedule(), token=51)
    turn = [*range(10), 7, 50, 51]
    scheduler.remove("first")
    scheduler.add("second", (*turn, 60, 61))
    plan = scheduler.schedule()
    assert shape(plan) == [("second", 12, 3, True)]
    execute(scheduler, plan)
    assert scheduler.remove("second").cached == 12
    status = scheduler.status()
    assert (status.prompt_tokens, status.cached_tokens) == (25, 12)
    assert status.prefix_hit_rate == 12 / 25


def test_the_last_token_is_computed_even_if_all_is_cached() -> None:
    scheduler = make(16)
    begin(scheduler, "a", range(8))
    begin(scheduler, "b", range(8))
    assert scheduler.remove("b").cached == 4


@pytest.mark.parametrize(
    "other", [{"cache_key": "salt"}, {"extension": Extension("yarn", 2.0, 8)}], ids=str
)
def test_prefixes_are_shared_only_where_keys_and_values_are_the_same(other: Any) -> None:
    scheduler = make(16)
    begin(scheduler, "a", range(8))
    begin(scheduler, "b", range(8), **other)
    begin(scheduler, "c", range(8), **other)
    assert [scheduler.remove(name).cached for name in "abc"] == [0, 0, 4]


def test_equal_prompts_that_come_together_are_computed_once() -> None:
    scheduler = make(32, max_batch_tokens=64)
    header = tuple(range(16))
    for i in range(4):
        scheduler.add(f"{i}", (*header, 100 + i))
    plan = scheduler.schedule()
    assert shape(plan) == [("0", 0, 17, True)]  # the others wait for it
    execute(scheduler, plan)
    plan = scheduler.schedule()
    assert shape(plan) == [("0", 17, 1, True)] + [(f"{i}", 16, 1, True) for i in (1, 2, 3)]


def test_what_was_spoiled_is_not_used_again() -> None:
    scheduler = make(16)
    begin(scheduler, "a", range(9))
    scheduler.remove("a", spoiled=True)
    begin(scheduler, "b", range(9))
    assert scheduler.remove("b").cached == 0


def test_without_a_prefix_cache_everything_is_computed() -> None:
    scheduler = make(16, prefix_cache=False)
    begin(scheduler, "a", range(9))
    begin(scheduler, "b", range(9))
    assert scheduler.remove("b").cached == 0


def test_a_higher_priority_goes_first_and_takes_the_place_of_a_lower_one() -> None:
    scheduler = make(16, max_sequences=2)
    begin(scheduler, "a", (1, 2))
    begin(scheduler, "b", (3, 4))
    scheduler.add("c", (5, 6))
    scheduler.add("urgent", (7, 8), priority=1)
    plan = scheduler.schedule()
    assert plan.preempted == ("b",)
    assert [c.request_id for c in plan.chunks] == ["a", "urgent"]
    execute(scheduler, plan)
    scheduler.remove("urgent")
    plan = scheduler.schedule()  # b is older than c
    assert [c.request_id for c in plan.chunks] == ["a", "b"]


def test_a_client_with_nothing_running_takes_a_place_of_the_one_that_runs_most() -> None:
    scheduler = make(64, max_sequences=3, max_batch_tokens=32)
    for i in range(9):
        scheduler.add(f"a{i}", (i, i), client="a")
    execute(scheduler, scheduler.schedule())
    scheduler.add("b0", (1, 2), client="b")
    scheduler.add("b1", (3, 4), client="b")
    plan = scheduler.schedule()
    assert plan.preempted == ("a2",)
    assert [c.request_id for c in plan.chunks] == ["a0", "a1", "b0"]
    execute(scheduler, plan)
    assert scheduler.schedule().preempted == ()  # b runs one: its second one waits


def test_prompts_of_several_clients_share_the_step_evenly() -> None:
    scheduler = make(64, max_batch_tokens=16)
    scheduler.add("a0", tuple(range(40)), client="a")
    execute(scheduler, scheduler.schedule())
    scheduler.add("b0", tuple(range(100, 112)), client="b")
    scheduler.add("c0", (1, 2), client="c")
    assert shape(scheduler.schedule()) == [
        ("a0", 16, 7, False),
        ("b0", 0, 7, False),
        ("c0", 0, 2, True),
    ]


def test_who_decodes_is_not_kept_waiting_by_a_long_prompt() -> None:
    scheduler = make(400, max_batch_tokens=512, max_mixed_tokens=128)
    begin(scheduler, "a", (1, 2))
    scheduler.add("long", tuple(range(1000)))
    assert shape(scheduler.schedule()) == [("a", 2, 1, True), ("long", 0, 127, False)]


def test_a_crowd_sits_out_the_step_of_a_newcomer_but_never_two_in_a_row() -> None:
    scheduler = make(100, max_batch_tokens=32, max_sequences=20)
    for number in range(10):
        scheduler.add(f"a{number}", (number, number), client="a")
    execute(scheduler, scheduler.schedule())
    crowd = {f"a{number}" for number in range(10)}
    for number, alone in enumerate([True, False, True]):
        scheduler.add(f"b{number}", (50 + number, 60), client="b")
        plan = scheduler.schedule()
        names = {chunk.request_id for chunk in plan.chunks}
        assert names == ({f"b{number}"} if alone else crowd | {f"b{number}"})
        execute(scheduler, plan)
        scheduler.remove(f"b{number}")
    scheduler.add("a10", (70, 71), client="a")  # of the crowd itself
    assert len(scheduler.schedule().chunks) == 11


def test_nobody_sits_out_for_a_long_prompt_or_a_lower_priority() -> None:
    for tokens, priority in ((40, 0), (4, -1)):
        scheduler = make(100, max_batch_tokens=32, max_sequences=20)
        for number in range(10):
            scheduler.add(f"a{number}", (number, number), client="a")
        execute(scheduler, scheduler.schedule())
        scheduler.add("b", tuple(range(tokens)), client="b", priority=priority)
        assert len(scheduler.schedule().chunks) == 11


def test_rows_of_a_prompt_are_wanted_once_and_bound_its_chunks() -> None:
    scheduler = make(16, max_batch_tokens=64, max_rows=5)
    begin(scheduler, "cached", range(13))
    scheduler.remove("cached")
    scheduler.add("scored", tuple(range(13)), rows_from=6)
    rows = []
    for _ in range(2):
        plan = scheduler.schedule()
        rows += [(c.start, len(c.token_ids), c.rows, c.sample) for c in plan.chunks]
        execute(scheduler, plan)
    # Of the cache only what lies before the first row.
    assert rows == [(4, 7, 5, False), (11, 2, 2, True)]


def test_drafts_stand_as_far_as_they_are_right() -> None:
    scheduler = make(16)
    begin(scheduler, "a", (1, 2, 3))
    assert [(name, list(tokens)) for name, tokens in scheduler.decoding()] == [("a", [1, 2, 3, 7])]
    plan = scheduler.schedule({"a": (8, 9, 10), "unknown": (1,)})
    chunk = plan.chunks[0]
    assert (chunk.token_ids, chunk.rows, chunk.drafted) == ((7, 8, 9, 10), 4, 3)
    scheduler.apply(plan, {"a": (8, 9, 99)})
    chunk = scheduler.schedule().chunks[0]
    assert (chunk.start, chunk.token_ids) == (6, (99,))


def test_nobody_loses_a_block_for_a_draft() -> None:
    scheduler = make(3)
    scheduler.add("a", (1, 2, 3))
    scheduler.add("b", (4, 5))
    execute(scheduler, scheduler.schedule())
    plan = scheduler.schedule({"a": (9, 9, 9), "b": (9, 9, 9)})
    assert plan.preempted == ()
    assert [(c.request_id, c.drafted) for c in plan.chunks] == [("a", 0), ("b", 1)]


def wait(flood: int, *, prompt: int = 48, step_cost: int = 40) -> float:
    """How long a client waits for its first token, in the time of computing one token, beside
    another one with `flood` requests of every size; a step costs something by itself.
    """
    generator = random.Random(0)
    scheduler = make(
        4096, block_tokens=16, max_batch_tokens=512, max_sequences=64, max_mixed_tokens=128
    )
    for i in range(flood):
        size = generator.choice((20, 200, 3000))
        scheduler.add(f"a{i}", tuple(range(i * 10_000, i * 10_000 + size)), client="a")
    for _ in range(200 if flood else 0):
        execute(scheduler, scheduler.schedule())
    worst = 0.0
    for i in range(30):
        before = scheduler.schedule()
        spent = step_cost + sum(len(c.token_ids) for c in before.chunks) if flood else 0
        scheduler.add(f"b{i}", tuple(range(-prompt * i - prompt, -prompt * i)), client="b")
        execute(scheduler, before)  # it came just after a step had begun
        for _ in range(100):
            plan = scheduler.schedule()
            spent += step_cost + sum(len(c.token_ids) for c in plan.chunks)
            execute(scheduler, plan)
            if any(c.request_id == f"b{i}" and c.sample for c in plan.chunks):
                break
        else:
            raise AssertionError("b never got a token")
        scheduler.remove(f"b{i}")
        worst = max(worst, spent)
    return worst


def test_a_flood_of_one_client_makes_another_wait_at_most_five_times_as_long_as_alone() -> None:
    assert wait(flood=300) <= 5 * wait(flood=0)
