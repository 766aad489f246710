"""How a request's positions are stretched beyond the length that a model was trained for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qwenkit.errors import UsageError, suggest

RopeMode = Literal["per-request", "as-config"]
ExtensionMethod = Literal[
    "none", "linear", "llama3", "dynamic", "qwen-ntk", "yarn", "dual-chunk"
]  # yarn: arXiv 2309.00071; dual-chunk: arXiv 2402.17463

ROPE_MODES: tuple[RopeMode, ...] = get_args(RopeMode)


def rope_mode(given: object) -> RopeMode:
    """A mode by its name. Raises UsageError naming the allowed ones."""
    for mode in ROPE_MODES:
        if given == mode:
            return mode
    raise UsageError(f"rope: got {given!r}. {suggest(str(given), ROPE_MODES)}")


@dataclass(frozen=True, slots=True)
class Extension:
    """What was decided for one request, once, and holds for all its tokens.

    `factor` is that of the method: how many times the trained length (yarn, linear, llama3,
    dynamic), Qwen's alpha (qwen-ntk), what the scores are multiplied by (dual-chunk).
    `trained_tokens` is the length it starts from. `planned_tokens` is the length it is made for,
    where the method depends on it; `growing`: a token beyond that is made for its own position.
    Equal extensions give equal keys for equal tokens, so it is a part of what a prefix is known by.
    """

    method: ExtensionMethod = "none"
    factor: float = 1.0
    trained_tokens: int | None = None
    planned_tokens: int | None = None
    growing: bool = False


NO_EXTENSION = Extension()
