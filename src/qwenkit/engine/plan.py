"""What the scheduler decides, as data: the chunks of one step, and counts of how it goes."""

from __future__ import annotations

from dataclasses import dataclass

from qwenkit.types.extension import NO_EXTENSION, Extension


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence: `token_ids` at positions from `start`.

    `blocks` hold the sequence's keys and values from position 0. The rows of the last `rows` tokens
    are wanted, as logits, or `hidden`: as hidden states. `sample`: the sequence's last token is in
    the chunk, so its row gives the next one; the `drafted` tokens behind it are guesses, which
    stand if the rows before them say the same. `extension` is its request's.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    rows: int = 1
    extension: Extension = NO_EXTENSION
    sample: bool = True
    drafted: int = 0
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: the chunks to compute, and the requests that lost their blocks to make room."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[str, ...] = ()


@dataclass(slots=True)
class Counts:
    """Tokens and events since an engine's start.

    `recomputed_tokens` are those of `computed_tokens` that were computed again after a preemption;
    `cached_tokens` those of the `prompt_tokens` of started prompts that were in the cache already;
    `accepted_tokens` those of the guessed `drafted_tokens` that stood.
    """

    computed_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the prompts' tokens that were in the cache already."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(slots=True, kw_only=True)
class SchedulerStatus(Counts):
    """How an engine goes at one moment, and its counts until then."""

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
