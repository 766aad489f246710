"""Two layouts of the same weights, turned into each other without reading a weight.

The layouts are told by a table from a name of the one to the names of the other, with `{}` for the
layer number. Several names: the one tensor's rows are theirs, one after another, in equal parts.
Knows no model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

import torch

from qwenkit.checkpoint.spec import StoredTensor
from qwenkit.errors import CheckpointError

Names = Mapping[str, tuple[str, ...]]
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def joined(tensors: Mapping[str, StoredTensor], names: Names) -> dict[str, StoredTensor]:
    """Tensors under the names that are `names`' values, under its keys; others stay as they are.

    Raises CheckpointError naming a part that is missing, or stored unlike its fellows.
    """
    whole_of = {part: whole for whole, parts in names.items() for part in parts}
    result: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        pattern, number = _pattern(name)
        whole = whole_of.get(pattern)
        if whole is None:
            result[name] = stored
        elif pattern == names[whole][0]:
            parts = [part.replace("{}", number) for part in names[whole]]
            result[whole.replace("{}", number)] = _join(tensors, parts)
        elif names[whole][0].replace("{}", number) not in tensors:
            result[name] = stored  # its first fellow is missing: reported as left over
    return result


def parted(tensors: Mapping[str, StoredTensor], names: Names) -> dict[str, StoredTensor]:
    """Tensors under the names that are `names`' keys, under its values; others stay as they are.

    Raises CheckpointError for a tensor whose rows do not go into equal parts.
    """
    result: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        pattern, number = _pattern(name)
        parts = [part.replace("{}", number) for part in names.get(pattern, (name,))]
        if stored.shape[0] % len(parts):
            raise CheckpointError(
                stored.file, name, f"has {stored.shape[0]} rows, not {len(parts)} equal parts."
            )
        for index, part in enumerate(parts):
            result[part] = stored if len(parts) == 1 else _part(stored, index, len(parts))
    return result


def reordered(stored: StoredTensor, order: Callable[[int], torch.Tensor]) -> StoredTensor:
    """A tensor with its rows in another order: `order` gives for so many rows the place [rows] of
    each.
    """
    return replace(stored, read=lambda: stored.read()[order(stored.shape[0])])


def _pattern(name: str) -> tuple[str, str]:
    """The name with `{}` for its layer number, and that number."""
    number = _LAYER.search(name)
    return (name, "") if number is None else (_LAYER.sub("{}", name, count=1), number[0])


def _join(tensors: Mapping[str, StoredTensor], parts: Sequence[str]) -> StoredTensor:
    first = tensors[parts[0]]
    found = [tensors[part] for part in takewhile(tensors.__contains__, parts)]
    if len(found) < len(parts):
        raise CheckpointError(first.file, parts[len(found)], f"is missing; {parts[0]} is there.")
    for part in found:
        if (part.storage, part.shape) != (first.storage, first.shape):
            raise CheckpointError(
                part.file,
                part.name,
                f"is {part.storage} {part.shape}; {first.name} is {first.storage} {first.shape}.",
            )
    if len(found) == 1:
        return first

    def read() -> torch.Tensor:
        return torch.cat([part.read() for part in found])

    return replace(
        first,
        shape=(len(found) * first.shape[0], *first.shape[1:]),
        size_bytes=sum(part.size_bytes for part in found),
        read=read,
    )


def _part(stored: StoredTensor, index: int, count: int) -> StoredTensor:
    rows = stored.shape[0] // count

    def read() -> torch.Tensor:
        return stored.read()[index * rows : (index + 1) * rows]

    return replace(
        stored,
        shape=(rows, *stored.shape[1:]),
        size_bytes=stored.size_bytes // count,
        read=read,
    )
