"""The whole answer to one request, and how long it took."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwenkit.types.events import FinishReason, TokenLogprob, Usage


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall times of one request, seconds from its submission."""

    prompt_tokens: int
    completion_tokens: int
    first_token_s: float
    total_s: float
    cached_tokens: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens that were computed, per second until the first token came: what was cached
        does not count, waiting does.
        """
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.first_token_s if self.first_token_s > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens per second after the first one; 0 when there was at most one."""
        span_s = self.total_s - self.first_token_s
        return (self.completion_tokens - 1) / span_s if self.completion_tokens > 1 and span_s else 0


@dataclass(frozen=True, slots=True)
class ReplyCall:
    """One call of a tool in a reply; `arguments` is the JSON text of an object.

    `repaired` says that this text is not to the letter what the model wrote. A call that is not
    `complete` was cut off, or was broken in a way that nothing could be made of: its `arguments`
    are then what the model wrote, and no JSON.
    """

    name: str
    arguments: str
    repaired: bool = False
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Reply:
    """What an assistant's turn says: its text, its thoughts, and the calls of tools in it."""

    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ReplyCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole answer to one request. `text` leaves out control tokens and the matched stop.

    `logprobs` has an entry for each of `token_ids`, `prompt_logprobs` for each of
    `prompt_token_ids` (None for the first one); both are None unless asked for. `reply` is what the
    text of an assistant's turn says; None where a text was completed.
    """

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
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    reply: Reply | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum of the output tokens' log-probabilities; None unless `logprobs` were asked."""
        return None if self.logprobs is None else math.fsum(t.logprob for t in self.logprobs)


@dataclass(frozen=True, slots=True)
class BeamCompletion:
    """One answer that a beam search found. `text` leaves out control tokens.

    `token_ids` are the new ones, with the stop token if the answer ended in one (`matched_stop`).
    `score` is `cumulative_logprob`, the sum of their log-probabilities, divided by their number to
    the power of the length penalty.
    """

    token_ids: tuple[int, ...]
    text: str
    score: float
    cumulative_logprob: float
    finish_reason: FinishReason
    matched_stop: str | int | None = None
