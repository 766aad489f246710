"""The scheduler under random arrivals, lengths, aborts, memory pressure, adapters, equal prefixes
and drafts. What must always hold is checked after every step; no tensor anywhere.

A cache is acted out: every place of it remembers of what tokens, under what key, it was made, so a
block that is shared wrongly, or used again too early, is found when it is read.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qwenkit.engine.blocks import BlockPool
from qwenkit.engine.plan import Chunk, Plan
from qwenkit.engine.scheduler import Scheduler


class SchedulerMachine(RuleBasedStateMachine):
    """Random operations; what must always hold is checked after every one of them."""

    @initialize(
        num_blocks=st.integers(3, 12),
        block_tokens=st.integers(1, 5),
        max_sequences=st.integers(1, 5),
        extra_budget=st.integers(0, 12),
        max_rows=st.integers(1, 8),
    )
    def build(
        self,
        num_blocks: int,
        block_tokens: int,
        max_sequences: int,
        extra_budget: int,
        max_rows: int,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_tokens = block_tokens
        self.max_sequences = max_sequences
        self.budget = max_sequences + extra_budget
        self.max_rows = max_rows
        self.scheduler = Scheduler(
            self.pool,
            block_tokens=block_tokens,
            max_batch_tokens=self.budget,
            max_sequences=max_sequences,
            max_rows=max_rows,
        )
        self.capacity = num_blocks * block_tokens
        self.cache: dict[tuple[int, int], object] = {}
        self.keys: dict[str, object] = {}
        self.tokens: dict[str, list[int]] = {}  # what each live sequence must consist of
        self.wanted: dict[str, int] = {}
        self.rows: dict[str, list[int]] = {}  # of the prompt, that were asked for and not yet given
        self.priorities: dict[str, int] = {}
        self.ended: list[str] = []
        self.added = 0

    @rule(
        prompt=st.integers(1, 60),
        shared=st.integers(0, 60),
        output=st.integers(1, 30),
        client=st.sampled_from("abc"),
        priority=st.sampled_from((0, 0, 0, 1)),
        key=st.sampled_from((None, "adapter")),
        rows_from=st.none() | st.integers(0, 60),
    )
    def add(
        self,
        prompt: int,
        shared: int,
        output: int,
        client: str,
        priority: int,
        key: object,
        rows_from: int | None,
    ) -> None:
        prompt = min(prompt, self.capacity - 1)
        name = f"{self.added:06}"
        self.added += 1
        self.tokens[name] = [i if i < shared else self.added * 1000 + i for i in range(prompt)]
        self.wanted[name] = prompt + min(output, self.capacity - prompt)
        self.keys[name], self.priorities[name] = key, priority
        first = prompt - 1 if rows_from is None else min(rows_from, prompt - 1)
        self.rows[name] = list(range(first, prompt - 1))
        self.scheduler.add(
            name,
            tuple(self.tokens[name]),
            client=client,
            priority=priority,
            cache_key=key,
            rows_from=rows_from,
        )

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), spoiled=st.booleans())
    def abort(self, data: st.DataObject, spoiled: bool) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.tokens))), spoiled=spoiled)

    def end(self, name: str, *, spoiled: bool = False) -> None:
        self.scheduler.remove(name, spoiled=spoiled)
        del self.tokens[name]
        self.ended.append(name)

    @rule(steps=st.integers(1, 6), failing=st.integers(0, 20), right=st.integers(0, 4))
    def run(self, steps: int, failing: int, right: int) -> None:
        for _ in range(steps):
            self.step(failing, right)
            self.check_everything()

    def step(self, failing: int = 0, right: int = 0) -> None:
        """One step in which every decoding sequence has a draft, `right` tokens of it correct."""
        drafts = {
            name: tuple(len(tokens) + i if i < right else -1 for i in range(4))
            for name, tokens in self.scheduler.decoding()
        }
        before = self.scheduler.status()
        plan = self.scheduler.schedule(drafts)
        self.check_plan(plan)
        if self.tokens:
            assert plan.chunks  # somebody always moves
        for chunk in plan.chunks:
            self.compute(chunk)
        sampled: dict[str, tuple[int, ...]] = {}
        for index, chunk in enumerate(c for c in plan.chunks if c.sample):
            name = chunk.request_id
            if failing == index + 1:  # a sampler that refuses: ended before the plan is applied
                self.end(name, spoiled=True)
                continue
            drafted = drafts.get(name, ())[: chunk.drafted]
            count = 1 + next((i for i, t in enumerate(drafted) if t < 0), len(drafted))
            count = min(count, self.wanted[name] - len(self.tokens[name]))
            first = len(self.tokens[name])
            sampled[name] = tuple(range(first, first + count))
        self.scheduler.apply(plan, sampled)
        after = self.scheduler.status()
        total = sum(len(chunk.token_ids) for chunk in plan.chunks)
        assert after.computed_tokens == before.computed_tokens + total
        assert after.recomputed_tokens <= after.computed_tokens
        for name, tokens in sampled.items():
            self.tokens[name] += tokens
            if len(self.tokens[name]) == self.wanted[name]:
                self.end(name)

    def compute(self, chunk: Chunk) -> None:
        """Read what the chunk stands on, and write what it makes."""
        key, tokens = self.keys[chunk.request_id], list(self.tokens[chunk.request_id])
        tokens = [*tokens[: chunk.start], *chunk.token_ids]
        for position in range(len(tokens)):
            place = (
                chunk.blocks[position // self.block_tokens],
                position % self.block_tokens,
            )
            content = key, tuple(tokens[: position + 1])
            if position < chunk.start:
                assert self.cache[place] == content
            else:
                self.cache[place] = content

    def check_plan(self, plan: Plan) -> None:
        names = [chunk.request_id for chunk in plan.chunks]
        assert len(names) == len(set(names)) <= self.max_sequences
        assert sum(len(chunk.token_ids) for chunk in plan.chunks) <= self.budget
        assert not set(plan.preempted) & set(names)
        written: list[int] = []
        for chunk in plan.chunks:
            stop = chunk.start + len(chunk.token_ids) - chunk.drafted
            expected = self.tokens[chunk.request_id]
            assert list(chunk.token_ids[: stop - chunk.start]) == expected[chunk.start : stop]
            assert stop > chunk.start
            assert chunk.sample == (stop == len(expected))
            assert chunk.sample or not chunk.drafted
            assert len(chunk.blocks) * self.block_tokens >= stop + chunk.drafted
            written += chunk.blocks[chunk.start // self.block_tokens :]
            self.check_rows(chunk, stop)
        assert len(written) == len(set(written))  # nobody writes into a neighbour's block
        assert all(self.pool.references(block) == 1 for block in written)

    def check_rows(self, chunk: Chunk, stop: int) -> None:
        """Every row that was asked for is given once, in order, and never many at a time."""
        rows = list(range(stop - (chunk.rows - chunk.drafted), stop))
        if chunk.sample:
            rows = rows[:-1]
        assert len(rows) <= self.max_rows
        waiting = self.rows[chunk.request_id]
        assert rows == waiting[: len(rows)]
        del waiting[: len(rows)]
        assert not waiting or not chunk.sample

    @invariant()
    def check_everything(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        running, waiting = self.scheduler._running, list(self.scheduler._line.in_order())
        names = [s.request_id for s in (*running, *waiting)]
        assert sorted(names) == sorted(self.tokens) == sorted(self.scheduler.request_ids)
        assert [s.arrival for s in running] == sorted(s.arrival for s in running)
        for client in "abc":  # a client's own are started in their order
            own = [(-s.priority, s.arrival) for s in waiting if s.client == client]
            assert own == sorted(own)
        held = [block for s in running for block in s.blocks]
        assert self.pool.free_blocks + len(set(held)) == self.pool.num_blocks
        for block in range(self.pool.num_blocks):
            assert self.pool.references(block) == held.count(block)
        assert len(running) <= self.max_sequences
        for s in running:
            assert s.tokens == self.tokens[s.request_id]
            assert 0 <= s.computed < len(s.tokens)
            # None missing for what is computed; beyond the tokens only what a draft needed.
            assert s.computed <= len(s.blocks) * self.block_tokens
            assert len(s.blocks) <= -(-(len(s.tokens) + 4) // self.block_tokens)
        for s in waiting:
            assert (s.computed, s.blocks) == (0, [])
        clients = {s.client for s in (*running, *waiting)}
        assert set(self.scheduler._line._served_tokens) == clients
        assert all(s.request_id in self.tokens for s in self.scheduler._prefixes._coming.values())
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
        assert not self.scheduler._prefixes._coming


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, derandomize=True, database=None
)
