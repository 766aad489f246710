"""Which part of a model is on which device: three ways to decide it, all of them pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwenkit.errors import UsageError, suggest
from qwenkit.kernels.devices import Device


@dataclass(frozen=True, slots=True)
class Parts:
    """The module paths of a model's parts, in the order of the computation.

    `tied`: the head uses the embedding's weight, so both are on one device.
    """

    embedding: str
    blocks: tuple[str, ...]
    norm: str
    head: str
    tied: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        return self.embedding, *self.blocks, self.norm, self.head

    def part_of(self, name: str) -> str | None:
        """The part that a tensor or a module belongs to."""
        return next((path for path in self.paths if _is_below(name, path)), None)


@dataclass(frozen=True, slots=True)
class DeviceMap:
    """The device of every part of a model; text says it in one line."""

    parts: Parts
    devices: Mapping[str, str]

    @property
    def single(self) -> str | None:
        """The one device that everything is on; None when there are several."""
        names = set(self.devices.values())
        return names.pop() if len(names) == 1 else None

    @property
    def first(self) -> str:
        """The device that token ids go to."""
        return self.devices[self.parts.embedding]

    @property
    def layer_devices(self) -> tuple[str, ...]:
        """The device of each layer, and so of its keys and values."""
        return tuple(self.devices[block] for block in self.parts.blocks)

    def __str__(self) -> str:
        blocks = []
        numbered = enumerate(self.layer_devices)
        for device, group in itertools.groupby(numbered, key=lambda pair: pair[1]):
            numbers = [number for number, _ in group]
            several = len(numbers) > 1
            which = f"layers {numbers[0]}–{numbers[-1]}" if several else f"layer {numbers[0]}"
            blocks.append(f"{which} on {device}")
        embedding, norm, head = (
            self.devices[path] for path in (self.parts.embedding, self.parts.norm, self.parts.head)
        )
        return f"embedding on {embedding}, {', '.join(blocks)}, norm on {norm}, head on {head}"


def split_evenly(parts: Parts, devices: Sequence[str]) -> DeviceMap:
    """The blocks over all `devices`, as the first Qwen's script for several cards shares them out.

    Embedding and head count as a block each, and so a device gets (blocks + 2) / devices of them,
    rounded up; the last gets what is left, which may be the head alone. The embedding is on the
    first device and the head on the last. So is the last norm on the first: after the last block
    hidden states go back to it, then on to the head. A tied head stays with its embedding.

    Raises UsageError when there are more devices than blocks.
    """
    count = len(devices)
    if not 1 <= count <= len(parts.blocks):
        raise UsageError(
            f"num_gpus: got {count}, but the model has {len(parts.blocks)} layers, which is the "
            "most that it can be split into."
        )
    share = (len(parts.blocks) + 2) / count
    placed = {parts.embedding: devices[0]}
    current, used = 0, 1  # the embedding takes a place on the first
    for block in parts.blocks:
        if used >= share and current < count - 1:
            current += 1
            used = 1 if current == count - 1 else 0  # and the head one on the last
        placed[block] = devices[current]
        used += 1
    placed |= {parts.norm: devices[0], parts.head: devices[0] if parts.tied else devices[-1]}
    return DeviceMap(parts, placed)


def fit_to_memory(
    parts: Parts, sizes_bytes: Mapping[str, int], devices: Sequence[Device]
) -> DeviceMap:
    """As few devices as hold everything, filled one after another; what is left is on the "cpu".

    `sizes_bytes` is what each part takes, a block with its keys and values. A tenth of a device's
    free memory is left for activations. A device whose free memory is not known holds anything.
    """
    room = {
        device.name: float("inf") if device.free_bytes is None else 0.9 * device.free_bytes
        for device in devices
    }
    total = sum(sizes_bytes.values()) - (sizes_bytes[parts.head] if parts.tied else 0)
    whole = next((name for name, size in room.items() if size >= total), None)
    if whole is not None:
        return DeviceMap(parts, dict.fromkeys(parts.paths, whole))
    names = [*room, "cpu"]
    room["cpu"] = float("inf")
    placed: dict[str, str] = {}
    for path in parts.paths:
        if path == parts.head and parts.tied:
            placed[path] = placed[parts.embedding]
            continue
        while room[names[0]] < sizes_bytes[path]:  # never back to an earlier one: each costs a copy
            del names[0]
        placed[path] = names[0]
        room[names[0]] -= sizes_bytes[path]
    return DeviceMap(parts, placed)


def place_as_given(parts: Parts, given: Mapping[str, str]) -> DeviceMap:
    """A map by module paths, such as {"model.embed_tokens": "cuda:0", "model.layers": "cuda:1"}.

    A path stands for all that is below it, "" for everything; the longest that fits a part decides.
    Raises UsageError for a path that is no part of the model, a part that no path covers, a block
    cut in two, and a tied head away from its embedding.
    """
    for path in given:
        if any(_is_below(part, path) for part in parts.paths):
            continue
        part = parts.part_of(path)
        if part is None:
            raise UsageError(f"device_map: no part is {path!r}. {suggest(path, parts.paths)}")
        raise UsageError(
            f"device_map: {path!r} is inside of {part!r}. A model is split between its blocks "
            "only; name the whole block."
        )
    placed: dict[str, str] = {}
    for part in parts.paths:
        fitting = [path for path in given if _is_below(part, path)]
        if not fitting:
            raise UsageError(
                f"device_map: says nothing of {part!r}. Add it, or '' for all that is not named."
            )
        placed[part] = given[max(fitting, key=len)]
    if parts.tied and placed[parts.head] != placed[parts.embedding]:
        raise UsageError(
            f"device_map: {parts.head!r} uses the weight of {parts.embedding!r} "
            f"(tie_word_embeddings); put both on one device."
        )
    return DeviceMap(parts, placed)


def _is_below(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")
