"""The scheduler under random arrivals, lengths, aborts and memory pressure; no tensor anywhere."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qwenkit.engine.blocks import BlockPool
from qwenkit.engine.scheduler import Plan, Scheduler


def make(
    num_blocks: int, *, block_tokens: int = 4, max_batch_tokens: int = 8, max_sequences: int = 4
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks),
        block_tokens=block_tokens,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
    )


def shape(plan: Plan) -> list[tuple[str, int, int, bool]]:
    return [(c.request_id, c.start, len(c.token_ids), c.sample) for c in plan.chunks]


def execute(scheduler: Scheduler, plan: Plan, token: int = 7) -> None:
    scheduler.apply(plan, dict.fromkeys(plan.sampled_ids, token))


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
    scheduler.add("third", tuple(range(9)))
    assert shape(scheduler.schedule()) == [
        ("long", 5, 1, True),
        ("short", 2, 1, True),
        ("third", 0, 2, False),
    ]


def test_the_youngest_gives_up_its_blocks_and_keeps_its_place() -> None:
    scheduler = make(3)
    for name in "abc":
        scheduler.add(name, (1, 2, 3))
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
    assert plan.chunks[0].token_ids == (1, 2, 3, 7, 7)
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
        for name in plan.sampled_ids:
            output[name] += 1
            if output[name] == lengths[name][1]:
                scheduler.remove(name)
                finished.append(name)
    status = scheduler.status()
    assert sorted(finished) == sorted(lengths)
    assert status.free_blocks == num_blocks
    assert status.preemptions > 0
    assert status.recomputed_tokens < 0.5 * status.computed_tokens


class SchedulerMachine(RuleBasedStateMachine):
    """Random operations; what must always hold is checked after every one of them."""

    @initialize(
        num_blocks=st.integers(3, 12),
        block_tokens=st.integers(1, 5),
        max_sequences=st.integers(1, 5),
        extra_budget=st.integers(0, 12),
    )
    def build(
        self, num_blocks: int, block_tokens: int, max_sequences: int, extra_budget: int
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_tokens = block_tokens
        self.max_sequences = max_sequences
        self.budget = max_sequences + extra_budget
        self.scheduler = Scheduler(
            self.pool,
            block_tokens=block_tokens,
            max_batch_tokens=self.budget,
            max_sequences=max_sequences,
        )
        self.capacity = num_blocks * block_tokens
        self.tokens: dict[str, list[int]] = {}  # what each live sequence must consist of
        self.wanted: dict[str, int] = {}
        self.ended: list[str] = []
        self.added = 0

    @rule(prompt=st.integers(1, 60), output=st.integers(1, 30))
    def add(self, prompt: int, output: int) -> None:
        prompt = min(prompt, self.capacity - 1)
        name = f"{self.added:06}"  # sorts by arrival
        self.added += 1
        self.tokens[name] = [self.added * 1000 + i for i in range(prompt)]
        self.wanted[name] = prompt + min(output, self.capacity - prompt)
        self.scheduler.add(name, tuple(self.tokens[name]))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.tokens))))

    def end(self, name: str) -> None:
        self.scheduler.remove(name)
        del self.tokens[name]
        self.ended.append(name)

    @rule(steps=st.integers(1, 6), failing=st.integers(0, 20))
    def run(self, steps: int, failing: int) -> None:
        for _ in range(steps):
            self.step(failing)
            self.check_everything()

    def step(self, failing: int = 0) -> None:
        oldest = min(self.tokens, default=None)
        before = self.scheduler.status().computed_tokens
        plan = self.scheduler.schedule()
        self.check_plan(plan)
        if oldest is not None:
            assert plan.chunks[0].request_id == oldest  # so somebody always moves
        for index, name in enumerate(plan.sampled_ids):
            if failing == index + 1:  # a sampler that refuses: ended before the plan is applied
                self.end(name)
        sampled = {n: len(self.tokens[n]) for n in plan.sampled_ids if n in self.tokens}
        self.scheduler.apply(plan, sampled)
        total = sum(len(chunk.token_ids) for chunk in plan.chunks)
        assert self.scheduler.status().computed_tokens == before + total
        for name, token in sampled.items():
            self.tokens[name].append(token)
            if len(self.tokens[name]) == self.wanted[name]:
                self.end(name)

    def check_plan(self, plan: Plan) -> None:
        names = [chunk.request_id for chunk in plan.chunks]
        assert names == sorted(set(names))
        assert len(names) <= self.max_sequences
        assert sum(len(chunk.token_ids) for chunk in plan.chunks) <= self.budget
        assert not set(plan.preempted) & set(names)
        for chunk in plan.chunks:
            stop = chunk.start + len(chunk.token_ids)
            expected = self.tokens[chunk.request_id]
            assert list(chunk.token_ids) == expected[chunk.start : stop]
            assert chunk.token_ids
            assert chunk.sample == (stop == len(expected))
            assert len(chunk.blocks) * self.block_tokens >= stop
        blocks = [block for chunk in plan.chunks for block in chunk.blocks]
        assert len(blocks) == len(set(blocks))  # nobody writes into a neighbour's block

    @invariant()
    def check_everything(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        running, waiting = self.scheduler._running, self.scheduler._waiting
        names = [s.request_id for s in (*running, *waiting)]
        assert names == sorted(self.tokens)  # in order of arrival, nobody lost, nobody twice
        assert set(self.scheduler.request_ids) == set(self.tokens)
        held = [block for s in running for block in s.blocks]
        assert len(held) == len(set(held))
        assert self.pool.free_blocks + len(held) == self.pool.num_blocks
        for block in range(self.pool.num_blocks):
            assert self.pool.references(block) == held.count(block)
        assert len(running) <= self.max_sequences
        for s in running:
            assert s.tokens == self.tokens[s.request_id]
            assert 0 <= s.computed < len(s.tokens)
            # No block more than the tokens need, and none missing for what is computed.
            assert s.computed <= len(s.blocks) * self.block_tokens
            assert len(s.blocks) <= -(-len(s.tokens) // self.block_tokens)
        for s in waiting:
            assert (s.computed, s.blocks) == (0, [])
        assert sorted([*self.ended, *self.tokens]) == [f"{i:06}" for i in range(self.added)]

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20_000):
            if not self.tokens:
                break
            self.step()
            self.check_everything()
        assert not self.tokens
        assert self.pool.free_blocks == self.pool.num_blocks


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, derandomize=True, database=None
)
