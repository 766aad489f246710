"""Which tokens of which requests are computed next: continuous batching (Orca, OSDI 2022) with
chunked prefill over a paged cache (arXiv 2309.06180) that keeps equal beginnings.

Pure decisions on plain data; knows no tensor, text or sampling. A sequence is tokens of which some
are computed: a fresh prompt, a decode and a sequence that starts again after losing its blocks
differ only in how many are not.

Who waits starts in the order of `line`. Who needs room takes it from who must yield: a sequence of
lower priority, or, for a client that runs nothing, the youngest one of the client that runs most.
Nobody yields to an equal, and the oldest sequence of the highest priority never does once it runs:
it moves in every step, which is why everything finishes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import islice

from qwenkit.engine.blocks import BlockPool, first_name
from qwenkit.engine.fairness import (
    last_to_keep,
    runs_already,
    share_prompts,
    who_pauses,
    who_yields,
)
from qwenkit.engine.line import Line
from qwenkit.engine.plan import Chunk, Counts, Plan, SchedulerStatus
from qwenkit.engine.prefixes import Prefixes
from qwenkit.engine.request import Sequence
from qwenkit.types.extension import NO_EXTENSION, Extension

LEAST_PROMPT_TOKENS = 32  # in a step, however many sequences decode in it

Drafts = Mapping[str, tuple[int, ...]]


class Scheduler:
    """Sequences that wait and run, over a pool of blocks of `block_tokens` tokens.

    Each step computes at most `max_batch_tokens` tokens of at most `max_sequences` sequences, and
    where some of them decode, so that they are not kept waiting, at most `max_mixed_tokens`; rows
    are wanted of at most `max_rows` tokens of a prompt. `prefix_cache` False: nothing is kept for
    sequences that begin the same. The caller guarantees that any one sequence fits the pool at its
    full length.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_tokens: int,
        max_batch_tokens: int,
        max_sequences: int,
        max_mixed_tokens: int | None = None,
        max_rows: int = 64,
        prefix_cache: bool = True,
    ) -> None:
        self._pool = pool
        self._block_tokens = block_tokens
        self._max_batch_tokens = max_batch_tokens
        self._max_mixed_tokens = max_mixed_tokens or max_batch_tokens
        self._max_sequences = max_sequences
        self._max_rows = max_rows
        self._prefixes = Prefixes(pool, block_tokens, enabled=prefix_cache)
        self._line = Line()
        self._running: list[Sequence] = []  # oldest first
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0
        self._counts = Counts()
        self._paused = False  # whether somebody sat the last step out

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return bool(self._sequences)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """All sequences that wait or run."""
        return tuple(self._sequences)

    def decoding(self) -> Iterable[tuple[str, list[int]]]:
        """The sequences that want their next token in the next step, with their tokens so far."""
        return ((s.request_id, s.tokens) for s in self._running if s.remaining == 1)

    def status(self) -> SchedulerStatus:
        """Counts of this moment."""
        return SchedulerStatus(
            running=len(self._running),
            waiting=len(self._line),
            free_blocks=self._pool.free_blocks,
            total_blocks=self._pool.num_blocks,
            **asdict(self._counts),
        )

    def add(
        self,
        request_id: str,
        prompt_ids: tuple[int, ...],
        extension: Extension = NO_EXTENSION,
        *,
        client: str = "",
        priority: int = 0,
        rows_from: int | None = None,
        hidden: bool = False,
        cache_key: object = None,
    ) -> None:
        """Queue a new sequence. Its keys and values are those of any other with the same tokens,
        extension and `cache_key`.
        """
        sequence = Sequence(
            request_id=request_id,
            tokens=list(prompt_ids),
            arrival=self._arrivals,
            extension=extension,
            client=client,
            priority=priority,
            rows_from=rows_from,
            hidden=hidden,
            root=first_name(extension, cache_key),
        )
        self._arrivals += 1
        self._sequences[request_id] = sequence
        self._line.enter(sequence)
        self._line.add(sequence)

    def remove(self, request_id: str, *, spoiled: bool = False) -> Sequence:
        """Forget a sequence, finished or not, and free its blocks at once. `spoiled`: what they
        hold is not to be used again.
        """
        sequence = self._sequences.pop(request_id)
        if spoiled:
            self._pool.drop_names(sequence.blocks)
        if sequence.blocks:
            self._stop(sequence)
        else:
            self._line.remove(sequence)
        self._line.leave(sequence)
        return sequence

    def schedule(self, drafts: Drafts | None = None) -> Plan:
        """Decide the next step: make room, let in, share the tokens out. `drafts` are guesses of
        what decoding sequences go on with, of which those are computed that there is room for.
        """
        preempted = self._grow_running()
        if not preempted:  # else the blocks just freed would go back to who lost them
            preempted = self._admit_waiting()
        return Plan(self._share_budget(drafts or {}), tuple(s.request_id for s in preempted))

    def apply(self, plan: Plan, sampled: Mapping[str, tuple[int, ...]]) -> None:
        """Take note that `plan` was computed and what tokens its sequences got: of one with a draft
        the part that stands and the one behind it. Who was removed meanwhile is skipped.
        """
        for chunk in plan.chunks:
            self._counts.computed_tokens += len(chunk.token_ids)
            sequence = self._sequences.get(chunk.request_id)
            if sequence is None:
                continue  # removed meanwhile
            new = sampled.get(chunk.request_id, ()) if chunk.sample else ()
            if chunk.drafted and not new:
                continue  # guesses spoiled it: as if it had not been computed
            stop = chunk.start + len(chunk.token_ids) - chunk.drafted
            if chunk.sample:
                sequence.tokens += new
                stop += max(0, len(new) - 1)  # whatever was drafted beyond that was wrong
                self._counts.drafted_tokens += chunk.drafted
                self._counts.accepted_tokens += max(0, len(new) - 1)
            if sequence.rows_from is not None:
                sequence.rows_from = max(sequence.rows_from, stop)
            self._counts.recomputed_tokens += max(0, min(stop, sequence.reached) - chunk.start)
            sequence.computed = stop
            sequence.reached = max(sequence.reached, stop)
            self._line.charge(sequence)
            self._prefixes.name_full_blocks(sequence, chunk.start)

    def _grow_running(self) -> list[Sequence]:
        """Give every running sequence the block that its next token needs, those first that yield
        last, taking from who must yield what is not free.
        """
        preempted: list[Sequence] = []
        for sequence in sorted(self._running, key=lambda s: (-s.priority, s.arrival)):
            if not sequence.blocks:
                continue  # it has lost them meanwhile
            missing = sequence.missing_blocks(len(sequence.tokens), self._block_tokens)
            while missing > self._pool.free_blocks and sequence.blocks:
                preempted.append(self._preempt(last_to_keep(self._running)))
            if sequence.blocks:
                sequence.blocks += self._pool.allocate(missing)
        return preempted

    def _admit_waiting(self) -> list[Sequence]:
        """Start waiting sequences, first in line first, while this step has tokens left for them.
        A newcomer takes all its blocks at once and leaves one for each running sequence to grow
        into; the next in line waits until it fits.
        """
        preempted: list[Sequence] = []
        budget = self._max_batch_tokens - sum(s.remaining for s in self._running)
        for sequence in islice(self._line.in_order(), self._max_sequences):
            cached = self._prefixes.find(sequence)
            if self._prefixes.is_coming(sequence, len(cached)):
                continue  # it waits for that rather than computing the same beside it
            yielding = self._who_yields(sequence, cached)
            if yielding is None:
                break
            if budget <= 0 and not yielding and runs_already(sequence, self._running):
                continue  # another client may be behind it
            preempted += [self._preempt(each) for each in yielding]
            self._start(sequence, cached)
            budget -= sequence.remaining
            if preempted:
                break
        return preempted

    def _who_yields(self, sequence: Sequence, cached: list[int]) -> list[Sequence] | None:
        missing = sequence.missing_blocks(len(sequence.tokens), self._block_tokens) - len(cached)
        needed = missing + self._pool.kept_among(cached)
        return who_yields(
            sequence, self._running, self._max_sequences, self._pool, needed, frozenset(cached)
        )

    def _start(self, sequence: Sequence, cached: list[int]) -> None:
        self._line.remove(sequence)
        self._pool.hold(cached)
        sequence.blocks = list(cached)
        missing = sequence.missing_blocks(len(sequence.tokens), self._block_tokens)
        sequence.blocks += self._pool.allocate(missing)
        sequence.computed = len(cached) * self._block_tokens
        if sequence.cached is None:
            sequence.cached = sequence.charged = sequence.computed
            self._counts.prompt_tokens += len(sequence.tokens)
            self._counts.cached_tokens += sequence.computed
        self._line.charge(sequence)
        self._running.append(sequence)
        self._running.sort(key=lambda s: s.arrival)
        self._prefixes.expect(sequence, len(cached))

    def _preempt(self, sequence: Sequence) -> Sequence:
        """Take a sequence's blocks; it waits at the place of its arrival, and goes on from what is
        still kept of them.
        """
        self._stop(sequence)
        self._counts.preemptions += 1
        sequence.computed = 0
        self._line.add(sequence)
        return sequence

    def _stop(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        self._prefixes.give_up(sequence)

    def _share_budget(self, drafts: Drafts) -> tuple[Chunk, ...]:
        """Every decode gets its token, but for a crowd's where somebody else's prompt is done by
        that, and never twice in a row; what is left goes to the prompts and then to drafts.
        """
        paused = set() if self._paused else who_pauses(self._running, self._max_mixed_tokens)
        self._paused = bool(paused)
        decodes = sum(s.remaining == 1 for s in self._running) - len(paused)
        prompts = [s for s in self._running if s.remaining > 1]
        budget = self._max_batch_tokens - decodes
        if decodes or paused:
            budget = min(budget, max(self._max_mixed_tokens - decodes, LEAST_PROMPT_TOKENS))
        shares = share_prompts(
            [(sequence, _most_tokens(sequence, self._max_rows)) for sequence in prompts], budget
        )
        budget -= sum(shares.values())
        chunks = []
        for sequence in self._running:
            name = sequence.request_id
            if name in paused:
                continue
            if sequence.remaining > 1:
                if shares[name]:
                    chunks.append(_chunk(sequence, shares[name]))
                continue
            draft = drafts.get(name, ())[: max(0, budget)]
            draft = _with_room(sequence, draft, self._pool, self._block_tokens, len(self._running))
            budget -= len(draft)
            chunks.append(_chunk(sequence, 1, draft))
        return tuple(chunks)


def _with_room(
    sequence: Sequence, draft: tuple[int, ...], pool: BlockPool, block_tokens: int, running: int
) -> tuple[int, ...]:
    """As much of a draft as there are blocks for: nobody of so many loses one for a guess, nor the
    one that another sequence may need for its next token.
    """
    if not draft:
        return draft
    spare = max(0, pool.free_blocks - running)
    missing = sequence.missing_blocks(len(sequence.tokens) + len(draft), block_tokens)
    sequence.blocks += pool.allocate(max(0, min(missing, spare)))
    room = len(sequence.blocks) * block_tokens - len(sequence.tokens)
    return draft[:room]


def _most_tokens(sequence: Sequence, max_rows: int) -> int:
    """As many of a prompt's tokens as one step may take: rows of logits are large."""
    if sequence.hidden:
        return sequence.remaining
    before_rows = max(0, sequence.first_row - sequence.computed)
    return min(sequence.remaining, before_rows + max_rows)


def _chunk(sequence: Sequence, count: int, draft: tuple[int, ...] = ()) -> Chunk:
    start, stop = sequence.computed, sequence.computed + count
    return Chunk(
        request_id=sequence.request_id,
        token_ids=(*sequence.tokens[start:stop], *draft),
        start=start,
        blocks=tuple(sequence.blocks),
        rows=max(0, stop - max(start, sequence.first_row)) + len(draft),
        sample=stop == len(sequence.tokens),
        drafted=len(draft),
        extension=sequence.extension,
        hidden=sequence.hidden,
    )
