"""A built model's weights as files hold them: under their published names, or under GGUF's.

The inverse of loading. A weight that two layers share comes once, under its first name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from qwenkit.errors import UsageError
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.linear import Linear
from qwenkit.layers.weight import QuantWeight
from qwenkit.models.spec import Architecture, CausalModel

# Architectures of which llama.cpp refuses a file without a head.
_HEAD_OF_ITS_OWN = ("qwen", "qwen2moe", "baichuan")


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


@dataclass(frozen=True, slots=True)
class GgufSlot:
    """A tensor of a GGUF file and where its numbers come from: of the parameter `part` of the
    module at `path`, the rows from `first_row` on, in this order or in that of `order` [rows],
    counted from there. `shape` is as the file has it; `rows` are those of all experts together.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    part: str
    first_row: int
    rows: int
    order: torch.Tensor | None
    unit_rows: bool

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) > 1

    @property
    def columns(self) -> int:
        """Numbers of a row."""
        return self.shape[-1] if self.is_matrix else 1

    @property
    def matrices(self) -> int:
        """As many as there are experts; 1 for any other matrix."""
        return math.prod(self.shape[:-2])

    def of(self, value: torch.Tensor | QuantWeight) -> NamedTensor:
        """The tensor of the weight `value` that its module has: bytes as they are stored, and plain
        numbers as they are, but vectors in fp32 and where GGUF's engines expect that with rows of
        length one. Raises UsageError for a weight that GGUF has no block type for.
        """
        (named,) = _named(self.path, self.part, value)
        if named.name != f"{self.path}.{self.part}":
            raise UsageError(f"{self.path}: GGUF has no block type for {named.storage} weights.")
        tensor = named.tensor
        if self.unit_rows and named.storage is None:
            tensor = functional.normalize(tensor.float(), dim=1).to(tensor.dtype)
        if not self.is_matrix:
            tensor = tensor.to(torch.float32)
        rows = tensor.reshape(-1) if not self.is_matrix else tensor.reshape(-1, tensor.shape[-1])
        rows = rows[self.first_row : self.first_row + self.rows]
        if self.order is not None:
            rows = rows[self.order]
        return NamedTensor(self.name, self.shape, named.storage, rows.reshape(*self.shape[:-1], -1))

    def numbers(self, value: torch.Tensor | QuantWeight, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a matrix in fp32, [rows, columns], as `of` has them."""
        first, last = self.first_row + start, self.first_row + stop
        if self.order is not None:
            index = self.order[start:stop] + self.first_row
            some = value.select_rows(index) if isinstance(value, QuantWeight) else value[index]
        elif isinstance(value, QuantWeight):
            some = value.row_range(first, last)
        else:
            some = value[first:last]
        numbers = some.dequantize(torch.float32) if isinstance(some, QuantWeight) else some.detach()
        if self.unit_rows:
            numbers = functional.normalize(numbers.float(), dim=1).to(numbers.dtype)
        return numbers.float()


def gguf_layout(model: CausalModel, architecture: Architecture) -> list[GgufSlot]:
    """The tensors of a model under GGUF's names: experts stacked in three dimensions, rotary rows
    in GGUF's order, sizes of one dropped. A tied head is written a second time for architectures of
    which llama.cpp wants one. Looks at shapes only: meta tensors will do.

    Raises UsageError for a weight that GGUF has no name for.
    """
    names = {ours: theirs for theirs, ours in architecture.gguf_names.items()}
    slots = []
    for path, module, part, value in _own_weights(model):
        number = next((step for step in path.split(".") if step.isdecimal()), "")
        pattern = f"{path}.{part}".replace(f".{number}.", ".{}.", 1) if number else f"{path}.{part}"
        if pattern not in names:
            raise UsageError(f"{path}.{part}: GGUF has no name for it in {architecture.gguf_arch}.")
        shape = tuple(value.shape)
        if isinstance(module, GroupedLinear):
            shape = (module.groups, module.out_features, module.in_features)
        elif isinstance(module, Linear) and module.out_features == 1:
            shape = shape[1:]
        parts = architecture.gguf_parts.get(names[pattern], (names[pattern],))
        shape = (shape[0] // len(parts), *shape[1:])
        rows = math.prod(shape[:-1]) if len(shape) > 1 else shape[0]
        for index, name in enumerate(parts):
            order = None
            if is_interleaved(name, architecture):
                order = pairs_from_halves(rows, model.config.head_dim)
            unit_rows = path in architecture.gguf_unit_rows
            name = name.replace("{}", number)
            slots.append(GgufSlot(name, shape, path, part, index * rows, rows, order, unit_rows))
    if model.config.tie_word_embeddings and architecture.gguf_arch in _HEAD_OF_ITS_OWN:
        embedding = next(slot for slot in slots if slot.name == "token_embd.weight")
        unit_rows = "lm_head" in architecture.gguf_unit_rows
        slots.append(replace(embedding, name="output.weight", unit_rows=unit_rows))
    return slots


def gguf_tensors(model: CausalModel, architecture: Architecture) -> Iterator[NamedTensor]:
    """The tensors of `gguf_layout` with their numbers.

    Raises UsageError for a weight that GGUF has no name or no block type for.
    """
    for slot in gguf_layout(model, architecture):
        yield slot.of(getattr(model.get_submodule(slot.path), slot.part))


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
