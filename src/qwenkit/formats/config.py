"""What a checkpoint's `quantization_config` may say, whatever the format: nothing is guessed.

AutoRound names its files' layout in `packing_format`; where that is GPTQ's or AWQ's, its config is
read as theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from qwenkit.errors import ConfigError, suggest
from qwenkit.formats.spec import formats

_AUTO_ROUND = ("auto-round", "intel/auto-round", "autoround")
_LAYOUTS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}
# Where each method lists modules that it left as they were.
_EXCLUDED = ("modules_to_not_convert", "llm_int8_skip_modules", "ignored_layers", "ignore")


def known_methods() -> tuple[str, ...]:
    """Every `quant_method` that some format reads."""
    return tuple(sorted({m for f in formats() for m in f.methods} | {_AUTO_ROUND[0]}))


def read_quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `quantization_config` of a `config.json`; empty where it has none.

    Raises ConfigError for a method that no format reads, naming those that are.
    """
    given = config.get("quantization_config")
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"quantization_config: expected an object, got {given!r}.")
    method = given.get("quant_method")
    if method in _AUTO_ROUND:
        layout = given.get("packing_format")
        if layout not in _LAYOUTS:
            raise ConfigError(
                f"quantization_config: packing_format is {layout!r}, a layout of AutoRound's own. "
                f"{suggest(str(layout), _LAYOUTS)} Export the model as one of these."
            )
        return {**given, "quant_method": _LAYOUTS[layout]}
    if method not in known_methods():
        raise ConfigError(
            f"quantization_config: quant_method is {method!r}. "
            f"{suggest(str(method), known_methods())}"
        )
    return given


def excluding_key(path: str, quantization: Mapping[str, Any]) -> str | None:
    """The key under which the config says that the module at `path` is not quantized; None where it
    does not.

    A list names modules by whole steps of their paths ("lm_head", "mlp.gate"); compressed-tensors'
    has regular expressions behind "re:", GPTQModel's `dynamic` behind "-:".
    """
    for key in _EXCLUDED:
        listed = quantization.get(key)
        if isinstance(listed, list) and any(_names(each, path) for each in listed):
            return key
    rules = quantization.get("dynamic")
    if isinstance(rules, Mapping) and _leaves_out(rules, path):
        return "dynamic"
    return None


def _names(given: Any, path: str) -> bool:
    if not isinstance(given, str) or not given:
        return False
    if given.startswith("re:"):
        return _matches(given.removeprefix("re:"), path)
    return f".{given}." in f".{path}."


def _leaves_out(rules: Iterable[Any], path: str) -> bool:
    """The first rule that matches decides."""
    for rule in rules:
        pattern = str(rule)
        if _matches(pattern.removeprefix("-:").removeprefix("+:"), path):
            return pattern.startswith("-:")
    return False


def _matches(pattern: str, path: str) -> bool:
    """Raises ConfigError for what is no regular expression."""
    try:
        return re.match(pattern, path) is not None
    except re.error as error:
        raise ConfigError(f"quantization_config: {pattern!r} is no pattern: {error}.") from error
