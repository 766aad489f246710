"""Reading of what `config.json` dictionaries say of positions: the rotary base, its scaling in the
old layout (`rope_theta`, `rope_scaling`) and the new one (`rope_parameters`), dual chunk attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qwenkit.errors import ConfigError, suggest
from qwenkit.layers.position import DualChunk, Dynamic, Linear, Llama3, Rotary, Scaling, Yarn
from qwenkit.models.config_keys import flag, only, positive, whole

_LAYOUTS = ("rope_parameters", "rope_scaling")


def rotary_position(
    config: Mapping[str, Any], *, head_dim: int, max_position_embeddings: int, base: float
) -> Rotary | DualChunk:
    """The position spec of every layer; `base` is the architecture's own if the config has none.

    Raises ConfigError naming the key: an unknown rope type, a value that is missing or impossible.
    """
    block_name, block = _block(config)
    theta = {"rope_theta": block.get("rope_theta", config.get("rope_theta"))}
    rotary_base = positive(theta, "rope_theta", base)
    if rotary_base == 1:
        raise ConfigError("rope_theta: 1 gives all rotations one speed; expected more.")
    partial = {"partial_rotary_factor": config.get("partial_rotary_factor"), **block}
    only(partial, "partial_rotary_factor", 1.0)
    # some models say the trained length beside the block, and then it is that one which counts
    beside = config.get("original_max_position_embeddings")
    if beside is not None:
        block = {**block, "original_max_position_embeddings": beside}
    try:
        scaling = _scaling(block, max_position_embeddings)
    except ConfigError as error:
        raise ConfigError(f"{block_name}: {error}") from error
    rotary = Rotary(head_dim, rotary_base, scaling)
    chunks = config.get("dual_chunk_attention_config")
    if chunks is None:
        return rotary
    if flag(config, "use_sliding_window", False):
        raise ConfigError("use_sliding_window: dual chunk attention has no window; keep one.")
    return _dual_chunk(chunks, rotary)


def _block(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The key that the scaling stands under, and what it holds.

    Where both layouts are there, they must not contradict each other.
    """
    found: list[tuple[str, Mapping[str, Any]]] = []
    for key in _LAYOUTS:
        block = config.get(key)
        if block is None:
            continue
        if not isinstance(block, Mapping):
            raise ConfigError(f"{key}: expected a dictionary, got {block!r}.")
        if any(isinstance(value, Mapping) for value in block.values()):
            raise ConfigError(f"{key}: a block for each kind of layer is not supported.")
        found.append((key, block))
    scaled = [pair for pair in found if rope_kind(pair[1]) != "default"]
    if len(scaled) == 2 and _without_base(scaled[0][1]) != _without_base(scaled[1][1]):
        raise ConfigError("rope_scaling: differs from rope_parameters; keep one of them.")
    base = {k: v for _, block in found for k, v in block.items() if k == "rope_theta"}
    key, block = (scaled or found or [("rope_parameters", {})])[0]
    return key, base | dict(block)


def _without_base(block: Mapping[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in block.items() if k not in ("rope_theta", "type", "rope_type")}
    return {**rest, "rope_type": rope_kind(block)}


def rope_kind(block: Mapping[str, Any]) -> object:
    """The type that a block names under either key; "default" where it names none."""
    return block.get("rope_type") or block.get("type") or "default"


def _scaling(block: Mapping[str, Any], longest: int) -> Scaling | None:
    kind = rope_kind(block)
    if kind == "default":
        if not {"rope_type", "type"} & set(block) and block.get("factor") is not None:
            raise ConfigError("rope_type: is missing beside factor; the type says what it scales.")
        return None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(
            f"rope_type: got {kind!r}. {suggest(str(kind), ROPE_TYPES)} Without this "
            "block the model works up to its trained length."
        )
    return _KINDS[kind](block, longest)


def _linear(block: Mapping[str, Any], longest: int) -> Linear:
    return Linear(factor=rope_factor(block))


def _dynamic(block: Mapping[str, Any], longest: int) -> Dynamic:
    return Dynamic(factor=rope_factor(block), trained_tokens=longest)


def _yarn(block: Mapping[str, Any], longest: int) -> Yarn:
    trained = whole(block, "original_max_position_embeddings", longest)
    named = block
    if block.get("factor") is None and block.get("original_max_position_embeddings") is not None:
        named = {"factor": max(1.0, longest / trained)}  # as transformers does
    fast, slow = _optional(block, "beta_fast"), _optional(block, "beta_slow")
    fast, slow = 32.0 if fast is None else fast, 1.0 if slow is None else slow
    if fast < slow:
        raise ConfigError(f"beta_fast: {fast:g} is below beta_slow {slow:g}.")
    return Yarn(
        factor=rope_factor(named),
        trained_tokens=trained,
        attention_factor=_optional(block, "attention_factor"),
        beta_fast=fast,
        beta_slow=slow,
        mscale=_optional(block, "mscale"),
        mscale_all_dim=_optional(block, "mscale_all_dim"),
        truncate=flag(block, "truncate", True),
    )


def _llama3(block: Mapping[str, Any], longest: int) -> Llama3:
    low, high = positive(block, "low_freq_factor"), positive(block, "high_freq_factor")
    if low >= high:
        raise ConfigError(f"low_freq_factor: {low:g} is not below high_freq_factor {high:g}.")
    return Llama3(
        factor=rope_factor(block),
        low_frequency_factor=low,
        high_frequency_factor=high,
        trained_tokens=whole(block, "original_max_position_embeddings", longest),
    )


_KINDS: Mapping[str, Callable[[Mapping[str, Any], int], Scaling]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
ROPE_TYPES = ("default", *_KINDS)


def rope_factor(block: Mapping[str, Any]) -> float:
    """How often the trained length fits. Raises ConfigError."""
    factor = positive(block, "factor")
    if not 1 <= factor <= 1e6:
        raise ConfigError(f"factor: expected a number from 1, got {factor:g}.")
    return factor


def _optional(block: Mapping[str, Any], key: str) -> float | None:
    """A positive number; None where there is none, or 0, which means the same."""
    return None if block.get(key) in (None, 0) else positive(block, key)


def _dual_chunk(block: object, rotary: Rotary) -> DualChunk:
    name = "dual_chunk_attention_config"
    if not isinstance(block, Mapping):
        raise ConfigError(f"{name}: expected a dictionary, got {block!r}.")
    if rotary.scaling is not None:
        raise ConfigError(f"{name}: together with a rope scaling is not supported; keep one.")
    try:
        trained = block.get("original_max_position_embeddings") or None  # 0: no scaling of scores
        spec = DualChunk(
            rotary=rotary,
            chunk_tokens=whole(block, "chunk_size", 8192),
            local_tokens=whole(block, "local_size", 1024),
            trained_tokens=trained and whole(block, "original_max_position_embeddings"),
            squared=flag(block, "square_factor", False),
        )
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    if spec.period < 1:
        raise ConfigError(
            f"{name}: local_size {spec.local_tokens} must be below chunk_size {spec.chunk_tokens}."
        )
    return spec
