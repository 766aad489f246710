"""The whole answer to one request, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass

from qwenkit.types.events import FinishReason, Usage


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A sampled token's natural log-probability, and the most likely alternatives (id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall times of one request, seconds from its submission."""

    prompt_tokens: int
    completion_tokens: int
    first_token_s: float
    total_s: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second until the first token came."""
        return self.prompt_tokens / self.first_token_s if self.first_token_s > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens per second after the first one; 0 when there was at most one."""
        span_s = self.total_s - self.first_token_s
        return (self.completion_tokens - 1) / span_s if self.completion_tokens > 1 and span_s else 0


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole answer to one request. `text` leaves out control tokens and the matched stop."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
    seed: int
    timing: Timing
    matched_stop: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None
