"""The ways of going beyond a model's trained length that benches compare, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qwenkit.errors import UsageError, suggest
from qwenkit.layers.position import (
    LARGEST_YARN_FACTOR,
    DualChunk,
    Dynamic,
    Linear,
    Position,
    QwenNtk,
    Rotary,
    Yarn,
)
from qwenkit.models.spec import CausalModel, ModelConfig
from qwenkit.types.extension import RopeMode


@dataclass(frozen=True, slots=True)
class Method:
    """A row: what the layers' position spec becomes, given the model's own and the trained length,
    and when it is extended.
    """

    position: Callable[[Rotary, int], Position]
    mode: RopeMode = "as-config"


def _plain(own: Rotary) -> Rotary:
    return dataclasses.replace(own, scaling=None, log_n=None)


METHODS: Mapping[str, Method] = {
    "none": Method(lambda own, trained: _plain(own)),
    "per-request": Method(lambda own, trained: own, "per-request"),
    "as-config": Method(lambda own, trained: own),
    "linear": Method(
        lambda own, trained: dataclasses.replace(
            _plain(own), scaling=Linear(factor=LARGEST_YARN_FACTOR)
        )
    ),
    "dynamic": Method(
        lambda own, trained: dataclasses.replace(
            _plain(own), scaling=Dynamic(factor=2.0, trained_tokens=trained)
        )
    ),
    "qwen-ntk": Method(
        lambda own, trained: dataclasses.replace(
            _plain(own), scaling=QwenNtk(trained_tokens=trained)
        )
    ),
    "qwen-ntk+logn": Method(
        lambda own, trained: dataclasses.replace(
            own, scaling=QwenNtk(trained_tokens=trained), log_n=trained
        )
    ),
    "yarn": Method(
        lambda own, trained: dataclasses.replace(
            _plain(own),
            scaling=Yarn(factor=LARGEST_YARN_FACTOR, trained_tokens=trained),
        )
    ),
    "dual-chunk": Method(
        lambda own, trained: DualChunk(
            rotary=_plain(own),
            chunk_tokens=max(trained * 3 // 4, 2),  # the paper's sizes
            local_tokens=max(trained // 16, 1),
        )
    ),
}


def check_methods(setting: str, names: Iterable[str]) -> None:
    """Raises UsageError naming the `setting`, with the nearest known name, for an unknown one."""
    for name in names:
        if name not in METHODS:
            raise UsageError(f"{setting}: got {name!r}. {suggest(name, METHODS)}")


def own_rotary(config: ModelConfig, model: str) -> Rotary:
    """The positions that methods extend. Raises UsageError naming the `model` that has none."""
    if not isinstance(config.position, Rotary):
        raise UsageError(f"model: {model} has no rotary positions to be extended.")
    return config.position


@contextmanager
def positioned(model: CausalModel, position: Position) -> Iterator[None]:
    """Every layer of a built model, and its config, with another position spec for a while."""
    config: Any = model.config  # a frozen dataclass, whatever the architecture
    if position == config.position:
        yield
        return
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "position")]
    try:
        model.config = dataclasses.replace(config, position=position)
        for layer in layers:
            layer.position = position
        yield
    finally:
        model.config = config
        for layer in layers:
            layer.position = config.position
