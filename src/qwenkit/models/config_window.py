"""Reading of the sliding windows that `config.json` dictionaries give to some layers.

`sliding_window` and `max_window_layers` stand in nearly every published file, dead: they count only
when `use_sliding_window` is true. Newer files may list every layer's kind in `layer_types`, which
then decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qwenkit.errors import ConfigError
from qwenkit.models.config_keys import flag, whole

Windows = tuple[int | None, ...]  # of each layer: how many keys a query sees; None: all
_FULL, _SLIDING = "full_attention", "sliding_attention"


def layer_windows(
    config: Mapping[str, Any], layers: int, *, slides: Callable[[int, int], bool]
) -> Windows:
    """The window of each layer, its own token counted.

    `slides(layer, max_window_layers)` says which layers have one where `layer_types` does not.
    Raises ConfigError naming the key.
    """
    used = flag(config, "use_sliding_window", False)
    window = None
    if used and config.get("sliding_window", 4096) is not None:
        window = whole(config, "sliding_window", 4096)
    kinds = config.get("layer_types")
    if kinds is None:
        first = _max_window_layers(config) if window is not None else 0
        return tuple(window if slides(layer, first) else None for layer in range(layers))
    if not isinstance(kinds, list | tuple) or len(kinds) != layers:
        raise ConfigError(f"layer_types: expected a list of {layers} kinds, got {kinds!r}.")
    wrong = next((kind for kind in kinds if kind not in (_FULL, _SLIDING)), None)
    if wrong is not None:
        raise ConfigError(f"layer_types: got {wrong!r}. Allowed: {_FULL!r}, {_SLIDING!r}.")
    if _SLIDING in kinds and window is None:
        raise ConfigError(
            "layer_types: some layers slide, but there is no window; set use_sliding_window and "
            f"sliding_window, or make all layers {_FULL!r}."
        )
    return tuple(window if kind == _SLIDING else None for kind in kinds)


def from_layer(layer: int, max_window_layers: int) -> bool:
    """Qwen2 and Qwen3: the upper layers, from `max_window_layers` on."""
    return layer >= max_window_layers


def every_second_below(layer: int, max_window_layers: int) -> bool:
    """The Qwen2 mixtures, as transformers reads them; no published one has a window."""
    return layer % 2 == 0 and layer < max_window_layers


def every_layer(layer: int, max_window_layers: int) -> bool:
    """The Qwen3 mixtures, as transformers reads them; no published one has a window."""
    return True


def _max_window_layers(config: Mapping[str, Any]) -> int:
    return 0 if config.get("max_window_layers") == 0 else whole(config, "max_window_layers", 28)
