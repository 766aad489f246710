"""The layouts that a mixture's experts come in, brought to one without reading a weight.

Experts lie in a file one by one (`experts.3.gate_proj.weight`, as published), stacked in one tensor
[experts, rows, columns] (`ffn_gate_exps` of a GGUF, `experts.down_proj` of transformers 5), or
stacked with gate above up (`experts.gate_up_proj` there). The result is one matrix
[experts * rows, columns] in each case.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qwenkit.checkpoint.spec import StoredTensor
from qwenkit.errors import CheckpointError

_FUSED = ".gate_up_proj"
_UNFUSED = (".gate_proj", ".up_proj")


def as_matrix(stored: StoredTensor) -> StoredTensor:
    """[…, rows, columns] as [all rows, columns], and [columns] as one row; nothing is copied."""

    def read() -> torch.Tensor:
        tensor = stored.read()
        return tensor.reshape(-1, tensor.shape[-1])

    return replace(stored, shape=(math.prod(stored.shape[:-1]), stored.shape[-1]), read=read)


def unfuse(tensors: dict[str, StoredTensor]) -> None:
    """Replace each stack of gate above up by two stacks, which are views."""
    for name in [n for n in tensors if n.endswith(_FUSED)]:
        stored = tensors[name]
        if len(stored.shape) != 3 or stored.shape[1] % 2:
            continue  # nothing known: it is reported as left over
        del tensors[name]
        for number, own in enumerate(_UNFUSED):
            tensors[f"{name.removesuffix(_FUSED)}{own}"] = _half(stored, number)


def _half(stored: StoredTensor, number: int) -> StoredTensor:
    groups, rows, columns = stored.shape
    start = number * (rows // 2)

    def read() -> torch.Tensor:
        return stored.read()[:, start : start + rows // 2]  # [groups, rows / 2, …]

    shape, size_bytes = (groups, rows // 2, columns), stored.size_bytes // 2
    return replace(stored, shape=shape, size_bytes=size_bytes, read=read)


def gather(
    tensors: dict[str, StoredTensor],
    path: str,
    *,
    groups: int,
    paths: Iterable[str],
    shape: tuple[int, int],
    checkpoint: Path,
) -> None:
    """Put the weight of a grouped layer under `{path}.weight`, whichever layout it came in.

    `paths` are the published paths of the `groups`, `shape` is (rows, columns) of one group. Raises
    CheckpointError naming the tensor that is missing, of another shape or stored unlike the others.
    """
    name = f"{path}.weight"
    stacked = next((n for n in (name, path) if n in tensors), None)
    if stacked is not None:
        stored = tensors.pop(stacked)
        _check(stored, stacked, (groups, *shape), checkpoint)
        tensors[name] = as_matrix(stored)
        return
    found = [
        _check(tensors.pop(f"{group}.weight", None), f"{group}.weight", shape, checkpoint)
        for group in paths
    ]
    for part in found:
        if part.storage != found[0].storage:
            first = f"{found[0].name} as {found[0].storage}"
            raise CheckpointError(
                part.file, part.name, f"is stored as {part.storage}, but {first}; convert one."
            )
    tensors[name] = _one_below_the_other(name, found)


def _check(
    stored: StoredTensor | None, name: str, shape: tuple[int, ...], checkpoint: Path
) -> StoredTensor:
    if stored is None:
        raise CheckpointError(checkpoint, name, f"is missing; the model needs it, {shape}.")
    if stored.shape != shape:
        raise CheckpointError(
            stored.file, name, f"has shape {stored.shape}; config.json asks for {shape}."
        )
    return stored


def _one_below_the_other(name: str, parts: Sequence[StoredTensor]) -> StoredTensor:
    """Matrices of one shape and storage as one; reading it copies them."""
    rows, columns = parts[0].shape
    return StoredTensor(
        name=name,
        shape=(len(parts) * rows, columns),
        storage=parts[0].storage,
        size_bytes=sum(part.size_bytes for part in parts),
        file=parts[0].file,
        read=lambda: torch.cat([part.read() for part in parts]),
    )
