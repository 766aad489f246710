"""Which tokens of which requests are computed next: continuous batching (Orca, OSDI 2022) with
chunked prefill over a paged cache (arXiv 2309.06180).

Pure decisions on plain data; knows no tensor, text or sampling. A sequence is tokens of which some
are computed: a fresh prompt, a decode and a sequence that starts again after losing its blocks
differ only in how many are not.

Order is order of arrival, always: the running sequences are the oldest ones, the next to be
admitted is the oldest that waits, the one that gives up its blocks is the youngest. So nobody is
overtaken, and the oldest moves in every step, which is why everything finishes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from qwenkit.engine.blocks import BlockPool
from qwenkit.engine.request import Sequence
from qwenkit.types.embedding import Pooling
from qwenkit.types.extension import NO_EXTENSION, Extension


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence: `token_ids` at positions from `start`.

    `blocks` hold the sequence's keys and values from position 0. `sample`: the chunk ends at the
    sequence's last token, so its last row gives the next one. `extension` is its request's.
    `hidden` is the number of its last tokens whose hidden states are wanted, in place of logits.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    sample: bool
    extension: Extension = NO_EXTENSION
    hidden: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: the chunks to compute, and the requests that lost their blocks to make room."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[str, ...] = ()

    @property
    def sampled_ids(self) -> tuple[str, ...]:
        """The requests that get a token, in the order of their logits rows."""
        return tuple(chunk.request_id for chunk in self.chunks if chunk.sample)


@dataclass(frozen=True, slots=True)
class SchedulerStatus:
    """Counts at one moment, and since the start: tokens computed, those of them computed again
    after a preemption, and preemptions.
    """

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    computed_tokens: int
    recomputed_tokens: int
    preemptions: int


class Scheduler:
    """Sequences that wait and run, over a pool of blocks of `block_tokens` tokens.

    Each step computes at most `max_batch_tokens` tokens of at most `max_sequences` sequences. The
    caller guarantees that any one sequence fits the pool at its full length.
    """

    def __init__(
        self, pool: BlockPool, *, block_tokens: int, max_batch_tokens: int, max_sequences: int
    ) -> None:
        self._pool = pool
        self._block_tokens = block_tokens
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._waiting: deque[Sequence] = deque()  # oldest first
        self._running: list[Sequence] = []  # oldest first, all older than the waiting ones
        self._sequences: dict[str, Sequence] = {}
        self._computed_tokens = self._recomputed_tokens = self._preemptions = 0

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return bool(self._sequences)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """All sequences that wait or run."""
        return tuple(self._sequences)

    def status(self) -> SchedulerStatus:
        """Counts of this moment."""
        return SchedulerStatus(
            running=len(self._running),
            waiting=len(self._waiting),
            free_blocks=self._pool.free_blocks,
            total_blocks=self._pool.num_blocks,
            computed_tokens=self._computed_tokens,
            recomputed_tokens=self._recomputed_tokens,
            preemptions=self._preemptions,
        )

    def add(
        self,
        request_id: str,
        prompt_ids: tuple[int, ...],
        extension: Extension = NO_EXTENSION,
        pooling: Pooling | None = None,
    ) -> None:
        """Queue a new sequence behind all others."""
        sequence = Sequence(request_id, list(prompt_ids), extension, pooling)
        self._sequences[request_id] = sequence
        self._waiting.append(sequence)

    def remove(self, request_id: str) -> None:
        """Forget a sequence, finished or not, and free its blocks at once."""
        sequence = self._sequences.pop(request_id)
        if sequence.blocks:
            self._running.remove(sequence)
            self._pool.release(sequence.blocks)
        else:
            self._waiting.remove(sequence)

    def schedule(self) -> Plan:
        """Decide the next step: make room, let in, share the tokens out."""
        preempted = self._grow_running()
        if not preempted:  # else the blocks just freed would go back to who lost them
            self._admit_waiting()
        return Plan(self._share_budget(), preempted)

    def apply(self, plan: Plan, sampled: Mapping[str, int]) -> None:
        """Take note that `plan` was computed and that its sequences got the `sampled` tokens.

        Sequences removed since the plan was made are skipped.
        """
        for chunk in plan.chunks:
            self._computed_tokens += len(chunk.token_ids)
            sequence = self._sequences.get(chunk.request_id)
            if sequence is None:
                continue
            sequence.computed += len(chunk.token_ids)
            if chunk.sample:
                sequence.tokens.append(sampled[chunk.request_id])

    def _missing_blocks(self, sequence: Sequence) -> int:
        return -(-len(sequence.tokens) // self._block_tokens) - len(sequence.blocks)

    def _grow_running(self) -> tuple[str, ...]:
        """Give every running sequence the block that its next token needs, oldest first, taking
        from the youngest what is not free.
        """
        preempted = []
        for index in range(len(self._running)):
            if index >= len(self._running):
                break  # this one and all younger ones have lost theirs
            sequence = self._running[index]
            missing = self._missing_blocks(sequence)
            while missing > self._pool.free_blocks and sequence.blocks:
                preempted.append(self._preempt_youngest())
            if sequence.blocks:
                sequence.blocks += self._pool.allocate(missing)
        return tuple(preempted)

    def _preempt_youngest(self) -> str:
        sequence = self._running.pop()
        self._pool.release(sequence.blocks)
        self._preemptions += 1
        self._recomputed_tokens += sequence.computed
        sequence.blocks = []
        sequence.computed = 0
        self._waiting.appendleft(sequence)  # older than all that wait: its place in the line
        return sequence.request_id

    def _admit_waiting(self) -> None:
        """Start the oldest waiting sequences whose tokens all fit, as long as there is work left in
        this step for them. A newcomer takes the blocks of all its tokens at once and leaves one for
        each running sequence to grow into.
        """
        budget = self._max_batch_tokens - sum(s.remaining for s in self._running)
        while self._waiting and budget > 0 and len(self._running) < self._max_sequences:
            sequence = self._waiting[0]
            missing = self._missing_blocks(sequence)
            if missing + len(self._running) > self._pool.free_blocks:
                break
            self._waiting.popleft()
            sequence.blocks = self._pool.allocate(missing)
            self._running.append(sequence)
            budget -= sequence.remaining

    def _share_budget(self) -> tuple[Chunk, ...]:
        """Every decode gets its token; what is left goes to the prompts, oldest first."""
        prompt_budget = self._max_batch_tokens - sum(s.remaining == 1 for s in self._running)
        chunks = []
        for sequence in self._running:
            count = 1
            if sequence.remaining > 1:
                count = min(sequence.remaining, prompt_budget)
                prompt_budget -= count
            if count:
                chunks.append(self._chunk(sequence, count))
        return tuple(chunks)

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        start, stop = sequence.computed, sequence.computed + count
        ends = stop == len(sequence.tokens)
        wanted = {None: 0, "last": int(ends), "mean": count}
        return Chunk(
            request_id=sequence.request_id,
            token_ids=tuple(sequence.tokens[start:stop]),
            start=start,
            blocks=tuple(sequence.blocks),
            sample=ends and sequence.pooling is None,
            extension=sequence.extension,
            hidden=wanted[sequence.pooling],
        )
