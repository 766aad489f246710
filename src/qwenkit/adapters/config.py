"""What an `adapter_config.json` of PEFT says, with the keys that would compute something else
refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import regex

from qwenkit.errors import ConfigError, suggest

ALL_LINEAR = "all-linear"
HEAD = "lm_head"
BIASES = ("none", "all", "lora_only")
_PATTERN_TIMEOUT_S = 1.0  # a pattern comes out of a file, and may be made to take for ever
# Starts that leave the base model's weights alone; the others change them, which no file here has.
_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_READ = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "target_modules"),
        *("exclude_modules", "rank_pattern", "alpha_pattern", "bias"),
        *("use_rslora", "modules_to_save", "layers_to_transform", "layers_pattern"),
        *("base_model_name_or_path", "init_lora_weights", "fan_in_fan_out", "lora_bias"),
    )
)
# Says how it was trained, or has a meaning only beside another key.
_WITHOUT_EFFECT = frozenset(
    (
        *("task_type", "inference_mode", "lora_dropout", "revision"),
        *("auto_mapping", "peft_version", "megatron_core", "qalora_group_size"),
        *("runtime_config", "eva_config", "ensure_weight_tying"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The keys that matter, under names of today; `given` is the whole object as it was read.

    `targets` are last steps of module paths, or one pattern that a whole path must match, or
    "all-linear"; `layers`, where given, are the only layers that have any. Ranks and alphas of
    single modules stand in the patterns, of which the first that matches counts.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    base_model: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def is_target(self, path: str) -> bool:
        """Whether the module at `path` is to have an adapter, were it a linear layer."""
        if _named(self.excluded, path) or any(_has_step(path, m) for m in self.modules_to_save):
            return False
        if self.targets == ALL_LINEAR:
            return path != HEAD
        if not _named(self.targets, path):
            return False
        if self.layers is None or isinstance(self.targets, str):
            return True
        return self._layer_of(path) in self.layers

    def rank_of(self, path: str) -> int:
        """The rank of the module at `path`."""
        return int(_by_pattern(self.rank_pattern, path, self.rank))

    def scaling_of(self, path: str) -> float:
        """What the product of the module's two matrices is multiplied by."""
        rank = self.rank_of(path)
        alpha = _by_pattern(self.alpha_pattern, path, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _layer_of(self, path: str) -> int | None:
        wanted = self.layers_pattern
        for name, number in pairwise(path.split(".")):
            if number.isdecimal() and (not wanted or any(matches(p, name) for p in wanted)):
                return int(number)
        return None


def read_config(given: Mapping[str, Any]) -> AdapterConfig:
    """From the dictionary of an `adapter_config.json`. Raises ConfigError naming the key.

    A key that is unknown here must be off (null, false or empty): PEFT adds keys for other ways of
    computing, and one that is on would silently give other numbers.
    """
    kind = given.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"peft_type: got {kind!r}; only LORA adapters are supported.")
    _refuse_other_ways(given)
    bias = given.get("bias", "none")
    if bias not in BIASES:
        raise ConfigError(f"bias: got {bias!r}. {suggest(bias, BIASES)}")
    ranks, alphas = _object(given, "rank_pattern"), _object(given, "alpha_pattern")
    targets = _names(given, "target_modules", pattern=True)
    if not targets:
        raise ConfigError("target_modules: is missing; it must name the adapted modules.")
    base = given.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"base_model_name_or_path: expected a text, got {base!r}.")
    modules = _names(given, "modules_to_save")
    return AdapterConfig(
        rank=_whole(given, "r", 8),
        alpha=_number("lora_alpha", given.get("lora_alpha", 8)),
        targets=targets,
        excluded=_names(given, "exclude_modules", pattern=True),
        rank_pattern={pattern: _whole(ranks, pattern) for pattern in ranks},
        alpha_pattern={pattern: _number(pattern, alpha) for pattern, alpha in alphas.items()},
        bias=bias,
        use_rslora=_flag(given, "use_rslora"),
        modules_to_save=modules if isinstance(modules, tuple) else (modules,),
        layers=_layers(given),
        layers_pattern=_one_or_more(given, "layers_pattern"),
        base_model=base or None,
        given=dict(given),
    )


def _refuse_other_ways(given: Mapping[str, Any]) -> None:
    if given.get("use_dora"):
        raise ConfigError("use_dora: DoRA adapters are not supported; merge it with peft first.")
    for key, value in given.items():
        if key not in _READ and key not in _WITHOUT_EFFECT and value not in (None, False, "", 0):
            if isinstance(value, Mapping | Sequence) and not value:
                continue
            raise ConfigError(f"{key}: got {value!r}, which is not supported; merge it with peft.")
    for key in ("fan_in_fan_out", "lora_bias"):
        _flag(given, key)
    start = given.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in _STARTS:
        raise ConfigError(
            f"init_lora_weights: {start!r} changed the base model's weights, which the file does "
            "not have. Convert the adapter with peft (path_initial_model_for_weight_conversion)."
        )


def _named(names: tuple[str, ...] | str, path: str) -> bool:
    if isinstance(names, str):
        return bool(names) and matches(names, path)
    return any(path == name or path.endswith(f".{name}") for name in names)


def _has_step(path: str, module: str) -> bool:
    return f".{module}." in f".{path}."


def _by_pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    for pattern, value in patterns.items():
        if matches(rf"(.*\.)?({pattern})", path):
            return value
    return default


def matches(pattern: str, path: str) -> bool:
    """Whether the whole path matches. Raises ConfigError for what is no pattern or takes too long
    to look for.
    """
    try:
        return regex.fullmatch(pattern, path, timeout=_PATTERN_TIMEOUT_S) is not None
    except TimeoutError as error:
        raise ConfigError(f"pattern {pattern!r}: takes too long for {path!r}.") from error
    except (regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"pattern {pattern!r}: is no regular expression: {error}.") from error


def _whole(given: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
        raise ConfigError(f"{key}: expected a whole number of at least 1, got {value!r}.")
    return value


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{key}: expected a number, got {value!r}.")
    return float(value)


def _flag(given: Mapping[str, Any], key: str) -> bool:
    value = given.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{key}: expected true or false, got {value!r}.")
    return value


def _object(given: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = given.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: expected an object, got {value!r}.")
    return value


def _names(given: Mapping[str, Any], key: str, *, pattern: bool = False) -> tuple[str, ...] | str:
    value = given.get(key) or ()
    if isinstance(value, str) and pattern:
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(n, str) and n for n in value):
        raise ConfigError(f"{key}: expected a list of names, got {value!r}.")
    return tuple(value)


def _one_or_more(given: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = _names(given, key, pattern=True)
    return (names,) if isinstance(names, str) else names


def _layers(given: Mapping[str, Any]) -> tuple[int, ...] | None:
    value = given.get("layers_to_transform")
    numbers = [value] if isinstance(value, int) else value
    if value is None or numbers == []:
        return None
    if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
        raise ConfigError(f"layers_to_transform: expected numbers of layers, got {value!r}.")
    return tuple(numbers)
