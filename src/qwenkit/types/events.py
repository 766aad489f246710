"""What an accepted request yields: what was asked of its prompt, token events, then exactly one
finish event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwenkit.types.extension import NO_EXTENSION, Extension

FinishReason = Literal["stop", "length", "language", "loop", "timeout", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log-probability under the model's raw distribution (before temperature,
    filters and penalties), and the most likely alternatives (id, logprob).
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


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
class PromptEvent:
    """Log-probabilities of the prompt's tokens at positions from `start` on, if they were asked
    for. None is that of the first token of all: nothing stands before it.

    The events of one prompt follow each other without a gap and come before its first token.
    """

    request_id: str
    start: int
    logprobs: tuple[TokenLogprob | None, ...]


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
    went wrong when `reason` is "error". "language" and "loop" are the guards of `SamplingParams`.
    `embedding` has the numbers, hidden_size of them, of a request that asked for an embedding and
    ended with the reason "stop".
    """

    request_id: str
    reason: FinishReason
    text: str
    usage: Usage
    matched_stop: str | int | None = None
    error: str | None = None
    embedding: tuple[float, ...] | None = None


Event = PromptEvent | TokenEvent | FinishEvent
