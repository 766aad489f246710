"""How one request chooses its tokens and where it stops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qwenkit.errors import RequestError, suggest


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping of one request.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch those filters off.
    `repetition_penalty` follows CTRL (arXiv 1909.05858) over prompt and output; presence and
    frequency penalties follow OpenAI's formula over the output. `max_tokens` None means: to the end
    of the context. `stop_token_sequences` are id sequences whose completion ends the output (the
    original's `stop_words_ids`). `logprobs` None reports none, k reports the chosen token and the k
    most likely ones.

    Raises RequestError naming the field on construction.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_token_sequences: tuple[tuple[int, ...], ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for field, low, high in _RANGES:
            value = getattr(self, field)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
            ):
                raise RequestError(field, f"expected a finite number, got {value!r}.")
            if not low <= value <= high:
                raise RequestError(field, f"got {value!r}; allowed: {low} to {high}.")
        for field, minimum in (
            ("max_tokens", 1),
            ("min_tokens", 0),
            ("top_k", 0),
            ("logprobs", 0),
            ("seed", 0),
        ):
            value = getattr(self, field)
            if value is None and field not in ("min_tokens", "top_k"):
                continue
            if (
                isinstance(value, bool)
                or not isinstance(value, int)
                or not minimum <= value < 2**63
            ):
                raise RequestError(
                    field, f"expected a whole number of at least {minimum}, got {value!r}."
                )
        if self.repetition_penalty == 0:
            raise RequestError("repetition_penalty", "must be above 0 (1.0 switches it off).")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise RequestError("stop", f"expected non-empty strings, got {self.stop!r}.")
        if any(not sequence for sequence in self.stop_token_sequences):
            raise RequestError(
                "stop_token_sequences", "an empty sequence of ids would stop every output at once."
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                "min_tokens", f"{self.min_tokens} is above max_tokens {self.max_tokens}."
            )

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0 or self.top_k == 1

    def replace(self, **changes: Any) -> Self:
        """A copy with fields changed; an unknown field is an error naming the nearest one."""
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise RequestError(name, f"unknown sampling option. {suggest(name, names)}")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Build from a dictionary; an unknown key is an error naming the nearest one."""
        return cls().replace(**options)


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, 100.0),
    ("presence_penalty", -100.0, 100.0),
    ("frequency_penalty", -100.0, 100.0),
)
