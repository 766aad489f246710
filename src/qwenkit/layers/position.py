"""Position specs: what a layer says of how its queries and keys learn where they stand, and what is
decided from one for a request.

RoPE (arXiv 2104.09864), ALiBi (arXiv 2108.12409), dual chunk attention (arXiv 2402.17463); the
scalings are those of transformers' `rope_parameters`, YaRN (arXiv 2309.00071) among them, and the
first Qwen's dynamic NTK and LogN (arXiv 2309.16609). Plain data and decisions; knows no tensor.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from qwenkit.types.extension import NO_EXTENSION, Extension, RopeMode

LARGEST_YARN_FACTOR = 4.0  # as far as the published Qwens were tried
ALIBI_BIAS = 8.0  # ALiBi's largest, at a distance of one (arXiv 2108.12409)
LARGEST_ALPHA_LENGTHS = 8  # Qwen's alpha of 15 reaches eight trained lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """All positions divided by `factor`; the model was trained so."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3:
    """Slow rotations divided by `factor`, fast ones kept; the model was trained so."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    trained_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic:
    """transformers' dynamic NTK: the base grows with the length, beyond the trained one."""

    factor: float
    trained_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenNtk:
    """The first Qwen's dynamic NTK: the base grows in steps, by the length of the prompt."""

    trained_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """Slow rotations divided by `factor`, fast ones kept, by a ramp between those that turn
    `beta_slow` and `beta_fast` times within the trained length. Cosines and sines are multiplied by
    `attention_factor`, which follows from the factor when it is None.
    """

    factor: float
    trained_tokens: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


Scaling = Linear | Llama3 | Dynamic | QwenNtk | Yarn


@dataclass(frozen=True, slots=True)
class Rotary:
    """Queries and keys are rotated by their position.

    `log_n` is the trained length from which on queries grow by log(position) / log(log_n), or None.
    """

    head_dim: int
    base: float
    scaling: Scaling | None = None
    log_n: int | None = None


@dataclass(frozen=True, slots=True)
class Alibi:
    """A score loses its head's slope for each position between query and key."""

    slopes: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DualChunk:
    """Rotation by positions that start again in every chunk of `chunk_tokens` - `local_tokens`.

    `trained_tokens`, if any, is the length beyond which the scores grow by 1 + log(length /
    trained_tokens) / 10; `squared`: by the square of that, as the reference engine computes.
    """

    rotary: Rotary
    chunk_tokens: int
    local_tokens: int
    trained_tokens: int | None = None
    squared: bool = False

    @property
    def period(self) -> int:
        """Tokens in one chunk: after so many, key positions start again from 0."""
        return self.chunk_tokens - self.local_tokens


Position = Rotary | DualChunk | Alibi | None  # None: the layer has no position embedding


def trained_tokens(position: Position, max_position_embeddings: int) -> int:
    """The length that the weights were trained for, from a layer's spec and its config's word."""
    scaling = position.scaling if isinstance(position, Rotary) else None
    if isinstance(scaling, Yarn | Dynamic | QwenNtk):
        return scaling.trained_tokens
    return max_position_embeddings


def allowed_tokens(position: Position, max_position_embeddings: int) -> int:
    """The longest sequence that the config allows, prompt and output together."""
    scaling = position.scaling if isinstance(position, Rotary) else None
    if isinstance(scaling, Yarn | Dynamic):
        reached = int(scaling.factor * scaling.trained_tokens)
        return max(max_position_embeddings, reached)
    return max_position_embeddings


def reachable_tokens(position: Position, max_position_embeddings: int, mode: RopeMode) -> int:
    """The longest sequence that can be served if the user asks for more than the config allows."""
    allowed = allowed_tokens(position, max_position_embeddings)
    if mode == "as-config" or not isinstance(position, Rotary):
        return allowed
    trained = trained_tokens(position, max_position_embeddings)
    if position.scaling is None or isinstance(position.scaling, Yarn):
        return max(allowed, int(LARGEST_YARN_FACTOR * trained))
    if isinstance(position.scaling, QwenNtk):
        return max(allowed, LARGEST_ALPHA_LENGTHS * trained)
    return allowed


def choose_extension(
    position: Position,
    mode: RopeMode,
    *,
    trained_tokens: int,
    prompt_tokens: int,
    total_tokens: int,
    training: bool = False,
) -> Extension:
    """What a sequence of `prompt_tokens` that may grow to `total_tokens` needs.

    "per-request" extends only what is longer than the model was trained for, and only so far;
    "as-config" does what the config says at every length, as transformers does. `training` leaves
    out what the first Qwen leaves out in training.
    """
    if isinstance(position, DualChunk):
        return _dual_chunk(position, prompt_tokens, total_tokens)
    if not isinstance(position, Rotary):
        return NO_EXTENSION
    match position.scaling:
        case Linear(factor=factor):
            return Extension("linear", factor)
        case Llama3(factor=factor, trained_tokens=trained):
            return Extension("llama3", factor, trained)
        case QwenNtk(trained_tokens=trained):
            alpha = 1.0 if training else qwen_alpha(prompt_tokens, trained)
            return Extension("qwen-ntk", alpha, trained) if alpha > 1 else NO_EXTENSION
        case Dynamic(factor=factor, trained_tokens=trained):
            return _dynamic(factor, trained, mode, prompt_tokens, total_tokens)
        case Yarn(factor=factor, trained_tokens=trained):
            if mode == "per-request":
                factor = smallest_factor(total_tokens, trained, largest=factor)
            elif factor <= 1:
                return Extension("yarn", factor, trained)
        case _:
            trained = trained_tokens
            factor = smallest_factor(total_tokens, trained) if mode == "per-request" else 1.0
    return Extension("yarn", factor, trained) if factor > 1 else NO_EXTENSION


def covered_tokens(
    position: Position, mode: RopeMode, extension: Extension, trained_tokens: int
) -> int | None:
    """The longest sequence that a chosen extension is meant for; None: it does not say."""
    if extension.method == "dynamic":
        return None if extension.growing else extension.planned_tokens
    if isinstance(position, DualChunk):
        return position.period if extension == NO_EXTENSION else None
    if mode == "as-config" or not isinstance(position, Rotary):
        return None
    if isinstance(position.scaling, Yarn | Dynamic):
        trained_tokens = position.scaling.trained_tokens
    elif position.scaling is not None:
        return None
    return int(extension.factor * trained_tokens)


def score_factor(position: DualChunk, extension: Extension) -> float:
    """What dual chunk attention's scores are multiplied by, beside head_dim^-0.5."""
    return extension.factor**2 if position.squared else extension.factor


def qwen_alpha(tokens: int, trained: int) -> float:
    """The first Qwen's alpha: 1, 3, 7, 15 for up to 1, 2, 4, 8 trained lengths."""
    return float(max(2 ** math.ceil(math.log2(tokens / trained) + 1) - 1, 1))


def smallest_factor(tokens: int, trained: int, *, largest: float = LARGEST_YARN_FACTOR) -> float:
    """Of 1, 2, 4 … and `largest` the first that reaches `tokens`; else the last."""
    factor = 1.0
    while factor * trained < tokens and factor < largest:
        factor = min(2 * factor, largest)
    while factor * trained < tokens and factor < LARGEST_YARN_FACTOR:  # more than the config says
        factor = min(2 * factor, LARGEST_YARN_FACTOR)
    return factor


def _dynamic(factor: float, trained: int, mode: RopeMode, prompt: int, total: int) -> Extension:
    if mode == "as-config":
        return Extension("dynamic", factor, trained, max(prompt, trained), growing=True)
    return Extension("dynamic", factor, trained, total) if total > trained else NO_EXTENSION


def _dual_chunk(position: DualChunk, prompt_tokens: int, total_tokens: int) -> Extension:
    trained = position.trained_tokens
    factor = 1.0
    if trained and prompt_tokens > trained:
        factor += 0.1 * math.log(prompt_tokens / trained)
    if factor == 1 and total_tokens <= position.period:
        return NO_EXTENSION  # one chunk: plain attention
    return Extension("dual-chunk", factor, trained)


def extended(position: Rotary, extension: Extension) -> Rotary:
    """The spec under a request's extension: nothing in it depends on a length any more."""
    match extension.method:
        case "yarn":
            return dataclasses.replace(position, scaling=_yarn(position.scaling, extension))
        case "qwen-ntk":
            return _with_base(position, extension.factor)
        case "dynamic":
            assert extension.planned_tokens, "a dynamic extension is made for a length"
            assert extension.trained_tokens, "a dynamic extension starts from a length"
            lengths = extension.planned_tokens / extension.trained_tokens
            stretch = extension.factor * lengths - (extension.factor - 1)
            return _with_base(position, stretch)
        case "linear" | "llama3":
            return position
    return position if position.scaling is None else dataclasses.replace(position, scaling=None)


def at_position(extension: Extension, position: int) -> Extension:
    """The extension of the token at `position`; another one only while it is growing."""
    planned = extension.planned_tokens
    if not extension.growing or planned is None or position < planned:
        return extension
    return dataclasses.replace(extension, planned_tokens=position + 1)


def _with_base(position: Rotary, stretch: float) -> Rotary:
    d = position.head_dim
    exponent = d / (d - 2) if d > 2 else 1.0  # one single rotation, of step 1 for any base
    return dataclasses.replace(position, base=position.base * stretch**exponent, scaling=None)


def _yarn(scaling: Scaling | None, extension: Extension) -> Yarn:
    if not isinstance(scaling, Yarn):
        trained = extension.trained_tokens
        assert trained, "YaRN starts from a trained length"
        return Yarn(factor=extension.factor, trained_tokens=trained)
    if scaling.factor == extension.factor:
        return scaling
    # a number made for the config's own factor says nothing of another one
    return dataclasses.replace(scaling, factor=extension.factor, attention_factor=None)
