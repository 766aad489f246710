"""A built model's weights as files hold them: under their published names, or under GGUF's.

The inverse of loading. A weight that two layers share comes once, under its first name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from qwenkit.errors import UsageError
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.linear import Linear
from qwenkit.layers.weight import QuantWeight
from qwenkit.models.spec import Architecture, CausalModel


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor to be written. `shape` is the logical shape; `storage` the tag of a quantized one,
    None for plain numbers of the tensor's dtype.
    """

    name: str
    shape: tuple[int, ...]
    storage: str | None
    tensor: torch.Tensor


def published_tensors(model: nn.Module) -> Iterator[NamedTensor]:
    """Under the names of the published checkpoints; every expert has tensors of its own.

    Of a part of a model, such as one layer, under their names below it.
    """
    for path, module, part, value in _own_weights(model):
        if isinstance(module, GroupedLinear):
            for group, own_path in enumerate(module.published_paths(path)):
                yield from _named(own_path, part, module.group_weight(group))
        else:
            yield from _named(path, part, value)


def gguf_tensors(model: CausalModel, architecture: Architecture) -> Iterator[NamedTensor]:
    """Under GGUF's names: experts stacked in three dimensions, rotary rows in GGUF's order, sizes
    of one dropped, vectors in fp32, heads of plain numbers with rows of length one where GGUF's
    engines expect that.

    Raises UsageError for a weight that GGUF has no name or no block type for.
    """
    names = {ours: theirs for theirs, ours in architecture.gguf_names.items()}
    for path, module, part, value in _own_weights(model):
        number = next((step for step in path.split(".") if step.isdecimal()), "")
        pattern = f"{path}.{part}".replace(f".{number}.", ".{}.", 1) if number else f"{path}.{part}"
        if pattern not in names:
            raise UsageError(f"{path}.{part}: GGUF has no name for it in {architecture.gguf_arch}.")
        if path in architecture.gguf_unit_rows and isinstance(value, torch.Tensor):
            value = functional.normalize(value.float(), dim=1).to(value.dtype)
        (named,) = _named(path, part, value)
        if named.name != f"{path}.{part}":
            raise UsageError(f"{path}: GGUF has no block type for {named.storage} weights.")
        shape, tensor = named.shape, named.tensor
        if isinstance(module, GroupedLinear):
            shape = (module.groups, module.out_features, module.in_features)
        elif isinstance(module, Linear) and module.out_features == 1:
            shape = shape[1:]
        if len(shape) == 1:
            tensor = tensor.to(torch.float32)
        tensor = tensor.reshape(*shape[:-1], -1)
        parts = architecture.gguf_parts.get(names[pattern], (names[pattern],))
        shape = (shape[0] // len(parts), *shape[1:])
        for name, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
            if is_interleaved(name, architecture):
                rows = rows[pairs_from_halves(shape[0], model.config.head_dim)]
            yield NamedTensor(name.replace("{}", number), shape, named.storage, rows)


def is_interleaved(gguf_name: str, architecture: Architecture) -> bool:
    """True for a tensor ("blk.3.attn_q.weight") whose rows are in GGUF's pairwise rotary order."""
    return any(step in architecture.gguf_interleaved for step in gguf_name.split("."))


def pairs_from_halves(rows: int, head_dim: int) -> torch.Tensor:
    """For each row in pairwise rotary order the row that holds it in rotate-half order. [rows]"""
    halves = torch.arange(rows).view(-1, 2, head_dim // 2)  # [heads, 2, head_dim / 2]
    return halves.transpose(1, 2).reshape(-1)


def _own_weights(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Module, str, torch.Tensor | QuantWeight]]:
    """(path, module, part, weight) of every module, what is shared once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, QuantWeight):
            continue  # came with its layer
        weights = [*module.named_parameters(recurse=False), *module.named_children()]
        for part, value in weights:
            if isinstance(value, torch.Tensor | QuantWeight) and id(value) not in seen:
                seen.add(id(value))
                yield path, module, part, value


def _named(path: str, part: str, value: torch.Tensor | QuantWeight) -> Iterator[NamedTensor]:
    if isinstance(value, torch.Tensor):
        yield NamedTensor(f"{path}.{part}", tuple(value.shape), None, value.detach())
        return
    for name, tensor in value.to_tensors().items():
        shape = value.shape if name == part else tuple(tensor.shape)
        yield NamedTensor(f"{path}.{name}", shape, value.storage, tensor)
