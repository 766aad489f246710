"""What a `quantization_config` of compressed-tensors says of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenkit.errors import CheckpointError, suggest

FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    "mixed-precision",  # each group of layers says its own
)
_STRATEGIES = ("tensor", "channel", "group", "block")
_ORDERS = (None, False, "weight", "static", "group", True)


@dataclass(frozen=True, slots=True)
class Scheme:
    """Of one group of layers: numbers of `bits` and a `type`, "int" or "float"; `strategy` says
    what shares a scale: "tensor", "channel", "group" (of `group_size` columns) or "block".
    """

    bits: int
    type: str
    strategy: str
    symmetric: bool
    group_size: int
    block: tuple[int, int]

    @property
    def fp8_tag(self) -> str | None:
        """The storage tag of FP8 weights; None where these are not FP8."""
        if (self.type, self.bits) != ("float", 8):
            return None
        tags = {"tensor": "FP8", "channel": "FP8_ROWS", "block": "FP8_{}X{}".format(*self.block)}
        return tags.get(self.strategy)


def schemes(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """The scheme of every group. Raises CheckpointError naming what is unknown or not read."""
    given = config.get("format")
    if given not in FORMATS:
        raise _error("format", f"got {given!r}. {suggest(str(given), FORMATS)}")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _error("config_groups", f"got {groups!r}; expected an object of groups.")
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise _error("sparsity_config", "sparse weights are not read; get the dense model.")
    if config.get("transform_config"):
        raise _error("transform_config", "weights that were rotated are not read.")
    return tuple(_scheme(name, group) for name, group in groups.items())


def _scheme(name: str, group: Any) -> Scheme:
    where = f"config_groups.{name}.weights"
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise _error(where, f"got {weights!r}; expected an object.")
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if type(bits) is not int or (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
        raise _error(where, f"got type {kind!r} of {bits!r} bits; int of 4 and 8 and float of 8.")
    strategy, order = weights.get("strategy"), weights.get("actorder")
    size, block = weights.get("group_size"), weights.get("block_structure")
    if strategy is None:
        strategy = "group" if size not in (None, -1) else "channel" if size == -1 else "tensor"
    if strategy not in _STRATEGIES:
        raise _error(where, f"strategy is {strategy!r}. {suggest(str(strategy), _STRATEGIES)}")
    if order not in _ORDERS:
        raise _error(where, f"actorder is {order!r}. {suggest(str(order), ('weight', 'group'))}")
    if weights.get("dynamic"):
        raise _error(where, "dynamic is not false, but weights are stored once and for all.")
    if strategy == "group" and (type(size) is not int or size < 1):
        raise _error(where, f"group_size is {size!r}; expected columns.")
    sizes = _block(block)
    if strategy == "block" and sizes is None:
        raise _error(where, f"block_structure is {block!r}; expected two numbers.")
    return Scheme(
        bits=bits,
        type=str(kind),
        strategy=strategy,
        symmetric=weights.get("symmetric", True) is True,
        group_size=size if type(size) is int else 0,
        block=sizes or (0, 0),
    )


def _block(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list) and [type(n) for n in value] == [int, int] and min(value) > 0:
        return value[0], value[1]
    return None


def _error(field: str, message: str) -> CheckpointError:
    return CheckpointError("quantization_config", field, message)
