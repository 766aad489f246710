"""What the scheduler decides, as data: the chunks of one step, and counts of how it goes."""

from __future__ import annotations

from dataclasses import dataclass

from qwenkit.types.extension import NO_EXTENSION, Extension


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence: `token_ids` at positions from `start`.

    `blocks` hold the sequence's keys and values from position 0. The rows of the last `rows` tokens
    are wanted. `sample`: the sequence's last token is in the chunk, so its row gives the next one;
    the `drafted` tokens behind it are guesses, which stand if the rows before them say the same.
    `extension` is its request's.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    rows: int = 1
    extension: Extension = NO_EXTENSION
    sample: bool = True
    drafted: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: the chunks to compute, and the requests that lost their blocks to make room."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SchedulerStatus:
    """Counts at one moment, and since the start: tokens computed, those of them computed again
    after a preemption, preemptions, tokens of prompts that were started, and those of them that
    were in the cache already.
    """

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    computed_tokens: int
    recomputed_tokens: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the prompts' tokens that were in the cache already."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
