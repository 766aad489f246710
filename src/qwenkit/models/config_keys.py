"""Reading of `config.json` dictionaries, old and new layouts alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwenkit.errors import ConfigError

_MOST_LAYERS = 10_000  # the largest published models have some hundred


def whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; ConfigError when it is wrong, or missing without a default."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ConfigError(f"{key}: expected a positive whole number, got {value!r}.")
    return value


def layer_count(config: Mapping[str, Any], key: str = "num_hidden_layers") -> int:
    """How many decoder layers; ConfigError where no model has so many: each takes time and room
    long before a tensor is missed.
    """
    layers = whole(config, key)
    if layers > _MOST_LAYERS:
        raise ConfigError(f"{key}: got {layers}; more than {_MOST_LAYERS} are not supported.")
    return layers


def positive(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number; ConfigError when it is wrong, or missing without a default."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ConfigError(f"{key}: expected a positive number, got {value!r}.")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false. Raises ConfigError for anything else."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ConfigError(f"{key}: expected true or false, got {value!r}.")
    return value


def only(config: Mapping[str, Any], key: str, supported: object) -> None:
    """Raise ConfigError unless `key` is absent or has the one value that is implemented."""
    value = config.get(key)
    if value is not None and value != supported:
        raise ConfigError(f"{key}: got {value!r}; only {supported!r} is supported.")
