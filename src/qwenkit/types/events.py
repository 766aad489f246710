"""What an accepted request yields: token events, then exactly one finish event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwenkit.types.extension import NO_EXTENSION, Extension

FinishReason = Literal["stop", "length", "timeout", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request; `cached_tokens` of the prompt were not computed again;
    `extension` is how it went beyond the trained length.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    extension: Extension = NO_EXTENSION


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One sampled token. `text` is the text that became certain with it: whole characters only,
    stop strings withheld.

    `logprob` is the natural log-probability of the token under the model's raw distribution (before
    temperature, filters and penalties); `top_logprobs` pairs (id, logprob), most likely first. Both
    None unless asked for.
    """

    request_id: str
    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The one terminal event. `text` is the rest of the text that was still held back.

    `matched_stop` is the stop string, or the token id, that ended the output; `error` says what
    went wrong when `reason` is "error". `embedding` has the numbers, hidden_size of them, of a
    request that asked for an embedding and ended with the reason "stop".
    """

    request_id: str
    reason: FinishReason
    text: str
    usage: Usage
    matched_stop: str | int | None = None
    error: str | None = None
    embedding: tuple[float, ...] | None = None


Event = TokenEvent | FinishEvent
