"""What a layer's tensors are as a weight: read by the format that claims them, and compared with
what the config says. A tensor that does not fit is an error with its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwenkit.checkpoint.spec import Checkpoint, StoredTensor
from qwenkit.errors import CheckpointError, ConfigError
from qwenkit.formats.config import excluding_key, read_quantization
from qwenkit.formats.spec import claim
from qwenkit.layers.weight import QuantWeight

PLAIN_STORAGES = ("F32", "F16", "BF16", "F64")


def has_own_format(path: str, tensors: Mapping[str, StoredTensor], checkpoint: Checkpoint) -> bool:
    """Whether the weight at `path` is several tensors that a format reads together."""
    prefix = f"{path}."
    storage = {n[len(prefix) :]: t.storage for n, t in tensors.items() if n.startswith(prefix)}
    return len(storage) > 1 and claim(storage, quantization_of(checkpoint)) is not None


def quantization_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What its config says of quantized weights. Raises ConfigError for an unknown method."""
    try:
        return read_quantization(checkpoint.config)
    except ConfigError as error:
        raise ConfigError(f"{checkpoint.path}: {error}") from error


def read_weight(
    path: str,
    below: dict[str, StoredTensor],
    shape: tuple[int, ...],
    checkpoint: Checkpoint,
) -> QuantWeight | None:
    """The weight of a layer in its storage format; takes its tensors out of `below`. None where
    no format claims them.
    """
    storage = {part: t.storage for part, t in below.items() if part != "bias"}
    given = quantization_of(checkpoint)
    chosen = claim(storage, given)
    if chosen is None:
        return None
    excluding = excluding_key(path, given)
    rows, columns = shape
    if storage.keys() == {"weight"}:  # of several tensors the format itself knows the shapes
        check_shape(checkpoint, f"{path}.weight", below["weight"], shape, below)
    stored = {part: below.pop(part) for part in storage}
    file = next(iter(stored.values())).file
    tag = chosen.name
    if excluding is not None:
        raise CheckpointError(
            file, path, f"is stored as {tag}, but quantization_config excludes it in {excluding}."
        )
    try:
        tag = chosen.tag(storage, given)
        tensors = {part: tensor.read() for part, tensor in stored.items()}
        weight = chosen.weight.from_tensors(tensors, shape=(rows, columns), storage=tag)
        chosen.check(weight, given)
        return weight
    except CheckpointError as error:
        raise CheckpointError(file, path, f"cannot be read as {tag}: {error}") from error


def check_shape(
    checkpoint: Checkpoint,
    name: str,
    stored: StoredTensor | None,
    shape: tuple[int, ...],
    others: Mapping[str, StoredTensor],
) -> None:
    if stored is None:
        unknown = [part for part in others if part not in ("weight", "bias")]
        method = quantization_of(checkpoint).get("quant_method")
        reason = f"is missing; the model needs it, {shape}."
        if unknown and name.endswith(".weight"):
            reason += (
                f" There are {', '.join(sorted(unknown))} in its place, which no known format "
                f"reads where quantization_config says quant_method {method!r}."
            )
        raise CheckpointError(checkpoint.path, name, reason)
    if stored.shape != shape:
        raise CheckpointError(
            stored.file, name, f"has shape {stored.shape}; config.json asks for {shape}."
        )
