"""A plan as tensors: what one forward pass needs to know of its flat tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from qwenkit.engine.plan import Plan
from qwenkit.layers.position import at_position
from qwenkit.types.extension import NO_EXTENSION, Extension

_NO_NUMBERS = torch.empty(0, dtype=torch.int64)
Sequences = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Batch:
    """The chunks of a plan one after another, all int64.

    `ids`, `positions` and `slots` are [tokens]; a slot is the place in the cache, block ·
    block_tokens + offset, that takes the token's key and value. `block_tables` is [sequences,
    most_blocks], short ones filled up with 0. `query_lengths` and `kv_lengths` are [sequences]:
    tokens in the chunk, and tokens in the cache once they are written. `rows` are the indices
    [rows] of the tokens whose logits or hidden states are wanted; None: all. `extensions` are the
    different ones of all tokens, `extension_index` [tokens] says whose each is (None: there is one
    only); `sequence_extensions` are those of the sequences. `numbers` are ids, positions, slots,
    lengths and block tables in one tensor, which those are pieces of.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    block_tables: torch.Tensor
    query_lengths: torch.Tensor
    kv_lengths: torch.Tensor
    rows: torch.Tensor | None
    extensions: tuple[Extension, ...] = (NO_EXTENSION,)
    extension_index: torch.Tensor | None = None
    sequence_extensions: tuple[Extension, ...] = ()
    numbers: torch.Tensor = _NO_NUMBERS

    @property
    def sequences(self) -> Sequences:
        """What paged attention asks of the sequences."""
        return self.block_tables, self.query_lengths, self.kv_lengths

    def to(self, device: torch.device) -> Batch:
        """The same with every tensor on `device`."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        moved: dict[str, Any] = {n: v.to(device) for n, v in values if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class Layout:
    """What a plan of at least one chunk says, as lists: `numbers` one after another as in `Batch`,
    of `tokens` and `sequences`. `width` is that of the block tables.
    """

    numbers: list[int]
    tokens: int
    sequences: int
    width: int
    rows: list[int] | None
    extensions: tuple[Extension, ...]
    extended_by: list[int]
    sequence_extensions: tuple[Extension, ...]
    end: int

    @property
    def positions(self) -> list[int]:
        """Those of the tokens."""
        return self.numbers[self.tokens : 2 * self.tokens]

    def batch(self, device: torch.device) -> Batch:
        """The same as tensors."""

        def whole(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        numbers = whole(self.numbers)
        return Batch(
            **pieces(numbers, self.tokens, self.sequences),
            rows=None if self.rows is None else whole(self.rows),
            extensions=self.extensions,
            extension_index=None if len(self.extensions) == 1 else whole(self.extended_by),
            sequence_extensions=self.sequence_extensions,
            numbers=numbers,
        )


def lay_out(plan: Plan, *, block_tokens: int, rounded: bool = False) -> Layout:
    """`rounded`: the width of the block tables is a power of two, so that it seldom changes."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    extensions: dict[Extension, int] = {}
    extended_by: list[int] = []
    for chunk in plan.chunks:
        ids += chunk.token_ids
        for position in range(chunk.start, chunk.start + len(chunk.token_ids)):
            positions.append(position)
            block = chunk.blocks[position // block_tokens]
            slots.append(block * block_tokens + position % block_tokens)
            if chunk.extension.growing:
                extension = at_position(chunk.extension, position)
                extended_by.append(extensions.setdefault(extension, len(extensions)))
        if not chunk.extension.growing:
            number = extensions.setdefault(chunk.extension, len(extensions))
            extended_by += [number] * len(chunk.token_ids)
        rows += range(len(ids) - chunk.rows, len(ids))
    lengths = [len(chunk.token_ids) for chunk in plan.chunks]
    ends = [chunk.start + len(chunk.token_ids) for chunk in plan.chunks]
    width = max(len(chunk.blocks) for chunk in plan.chunks)
    if rounded:
        width = 1 << (width - 1).bit_length()
    return Layout(
        numbers=[*ids, *positions, *slots, *lengths, *ends, *_tables(plan, width)],
        tokens=len(ids),
        sequences=len(lengths),
        width=width,
        rows=None if len(rows) == len(ids) else rows,
        extensions=tuple(extensions),
        extended_by=extended_by,
        sequence_extensions=tuple(chunk.extension for chunk in plan.chunks),
        end=max(ends),
    )


def build(plan: Plan, *, block_tokens: int, device: torch.device) -> Batch:
    """Lay out a plan of at least one chunk as tensors."""
    return lay_out(plan, block_tokens=block_tokens).batch(device)


def _tables(plan: Plan, width: int) -> list[int]:
    """The block tables, one after another."""
    tables: list[int] = []
    for chunk in plan.chunks:
        tables += chunk.blocks
        tables += [0] * (width - len(chunk.blocks))
    return tables


def pieces(numbers: torch.Tensor, tokens: int, sequences: int) -> dict[str, torch.Tensor]:
    """What lies in `Batch.numbers`, by its name."""
    names = "ids", "positions", "slots", "query_lengths", "kv_lengths", "block_tables"
    sizes = [tokens, tokens, tokens, sequences, sequences]
    parts = torch.split(numbers, [*sizes, len(numbers) - sum(sizes)])
    found = dict(zip(names, parts, strict=True))
    found["block_tables"] = found["block_tables"].view(sequences, -1)
    return found
