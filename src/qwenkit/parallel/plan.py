"""A device map for a checkpoint on this machine, before anything of it is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from qwenkit.checkpoint import open_checkpoint
from qwenkit.checkpoint.spec import Checkpoint, StoredTensor
from qwenkit.errors import UsageError
from qwenkit.kernels import devices
from qwenkit.kernels.devices import ACCELERATORS, Device, choose_precision, find_cpu, find_device
from qwenkit.load import check_layers, matrix_storages, read_architecture
from qwenkit.models.spec import Architecture, ModelConfig
from qwenkit.parallel.connect import model_parts
from qwenkit.parallel.device_map import (
    DeviceMap,
    Parts,
    fit_to_memory,
    place_as_given,
    split_evenly,
)
from qwenkit.stored_weight import PLAIN_STORAGES
from qwenkit.tensor_names import tensors_by_our_names

Place = str | int | torch.device
GivenMap = Place | Mapping[str, Place]


def read_places(given: GivenMap) -> str | dict[str, str]:
    """What was given, in names and before anything is loaded: "auto", a device, or a map of them.

    `given` is "auto", a device ("cpu", "cuda:1", a torch.device, a number among the accelerators),
    or a mapping of module paths to devices. Raises UsageError for a device that is not there.
    """
    if isinstance(given, Mapping):
        for path in given:
            if not isinstance(path, str):
                raise UsageError(f"device_map: expected a module path as text, got {path!r}.")
        return {path: _named(place) for path, place in given.items()}
    return "auto" if given == "auto" else _named(given)


def plan_devices(
    path: Path,
    places: str | Mapping[str, str],
    *,
    dtype: str = "auto",
    kv_cache_tokens: int | None = None,
) -> str | DeviceMap:
    """Where the parts of the checkpoint at `path` go: one device for all of them, or a map.

    `places` is what `read_places` gives. "auto" takes the fewest accelerators whose free memory
    holds the model in `dtype` and `kv_cache_tokens` keys and values (None: the model's context),
    and the processor for the rest, or for all when there is none.

    Raises UsageError for a map that cannot be, and what opening a checkpoint raises.
    """
    if isinstance(places, str) and places != "auto":
        return places
    accelerators = devices.find_accelerators()
    if places == "auto" and not accelerators:
        return find_cpu().name
    checkpoint = open_checkpoint(path)
    architecture, config = read_architecture(checkpoint)
    parts = _parts(checkpoint, architecture, config)
    if isinstance(places, str):
        precision = choose_precision(dtype, matrix_storages(checkpoint), accelerators)
        tokens = kv_cache_tokens or config.max_position_embeddings
        sizes = _sizes_bytes(parts, checkpoint, architecture, config, precision.dtype, tokens)
        placed = fit_to_memory(parts, sizes, accelerators)
    else:
        placed = place_as_given(parts, places)
    return placed.single or placed


def plan_evenly(path: Path, num_gpus: int) -> DeviceMap:
    """The blocks of the checkpoint at `path` shared out over the first `num_gpus` accelerators.

    Raises UsageError when the machine has fewer, or the model fewer blocks.
    """
    found = devices.find_accelerators()
    if isinstance(num_gpus, bool) or not isinstance(num_gpus, int) or num_gpus < 1:
        raise UsageError(f"num_gpus: expected a whole number of at least 1, got {num_gpus!r}.")
    if num_gpus > len(found):
        names = ", ".join(device.name for device in found) or "none"
        raise UsageError(
            f"num_gpus: got {num_gpus}, but torch finds {len(found)} here ({names}). Use as many, "
            "or device_map='auto', which takes the processor for what does not fit."
        )
    checkpoint = open_checkpoint(path)
    parts = _parts(checkpoint, *read_architecture(checkpoint))
    return split_evenly(parts, [device.name for device in found[:num_gpus]])


def _named(place: Place) -> str:
    """The name of a device that is there, from any of the ways to give it. Raises UsageError."""
    if isinstance(place, bool) or not isinstance(place, str | int | torch.device):
        raise UsageError(f"device_map: expected a device or its number, got {place!r}.")
    text = str(place)
    return _numbered(int(text)).name if text.isdecimal() else find_device(text).name


def _numbered(number: int) -> Device:
    found = devices.find_accelerators()
    if not 0 <= number < len(found):
        names = ", ".join(device.name for device in found) or "none"
        raise UsageError(
            f"device_map: there is no accelerator {number}; torch finds {len(found)} ({names}), of "
            f"the kinds {', '.join(ACCELERATORS)}. 'cpu' always is there."
        )
    return found[number]


def _parts(checkpoint: Checkpoint, architecture: Architecture, config: ModelConfig) -> Parts:
    check_layers(checkpoint, config)
    with torch.device("meta"):
        return model_parts(architecture.build(config))


def _sizes_bytes(
    parts: Parts,
    checkpoint: Checkpoint,
    architecture: Architecture,
    config: ModelConfig,
    dtype: torch.dtype,
    kv_cache_tokens: int,
) -> dict[str, int]:
    """What each part takes on a device, a block with its keys and values."""
    numbers = 2 * config.num_key_value_heads * config.head_dim * kv_cache_tokens
    sizes = dict.fromkeys(parts.paths, 0)
    sizes |= dict.fromkeys(parts.blocks, numbers * dtype.itemsize)
    for name, tensor in tensors_by_our_names(architecture, checkpoint, config.head_dim).items():
        part = parts.part_of(name)
        if part is not None:
            sizes[part] += _size_bytes(tensor, dtype)
    return sizes


def _size_bytes(tensor: StoredTensor, dtype: torch.dtype) -> int:
    """A plain tensor is converted to `dtype`; one in a format stays as it is stored."""
    if tensor.storage in PLAIN_STORAGES:
        return math.prod(tensor.shape) * dtype.itemsize
    return tensor.size_bytes
