"""Decoding steps repeated in native code: the same kernel calls on inputs refilled in place.

A step in which every token gives a row of logits, as in decoding and checking what was drafted,
makes the same calls each time, with other numbers in the same small tensors. Of each number of
tokens and sequences the first step runs as always,
which tells what positions the model asks for; the second is recorded while it runs; later ones are
repeated. A model that computes with anything but native kernels is never recorded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qwenkit.engine.batch import Batch, pieces
from qwenkit.engine.kv import KVCache
from qwenkit.engine.paged import PagedAttention
from qwenkit.engine.served import ServedModel
from qwenkit.kernels.cpu.replay import NotReplayableError, Program, record
from qwenkit.layers.position import Rotary, extended
from qwenkit.layers.rope import Tables, rotary_tables
from qwenkit.types.extension import NO_EXTENSION

_MOST_TOKENS = 16  # beyond, a step takes long enough for Python not to be noticed
_MOST_PROGRAMS = 64
_LEAST_ROTATIONS = 1024  # rows of a table that are made at once, and doubled when they run out
_MOST_SPECS = 1024  # adapters stand over a batch in ever new ways

# Tokens, sequences, width of the block tables, threads, each token's adapter.
Key = tuple[int, int, int, int, tuple[int, ...]]


class Replayer:
    """The recorded steps of one model over one cache."""

    def __init__(self, model: ServedModel, cache: KVCache) -> None:
        self._model = model
        self._cache = cache
        self._specs: dict[Key, tuple[Rotary, ...]] = {}
        self._steps: dict[Key, _Step] = {}
        self._rotations = _Rotations()
        self._refused = False

    def run(self, batch: Batch, adapter_keys: tuple[int, ...] = ()) -> torch.Tensor | None:
        """Logits [tokens, vocab_size], overwritten by the next call; None where the step is not one
        that is repeated: then it must be computed as always.
        """
        tokens = len(batch.ids)
        if self._refused or batch.rows is not None or tokens > _MOST_TOKENS:
            return None
        sequences, width = batch.block_tables.shape
        key = tokens, sequences, width, torch.get_num_threads(), adapter_keys
        context = PagedAttention(self._cache, batch)
        if key in self._steps:
            return self._steps[key].run(batch, context, self._rotations)
        if key not in self._specs:
            if len(self._specs) >= _MOST_SPECS:
                self._specs.clear()
            result = self._model(batch.ids, context)
            self._specs[key] = tuple(context.tables)
            return result
        if len(self._steps) >= _MOST_PROGRAMS:
            self._steps.clear()
        try:
            step = _Step(self._model, self._cache, batch, context, self._specs[key])
        except NotReplayableError:
            self._refused = True
            return None
        self._steps[key] = step
        return step.result


class _Step:
    """One recorded step: its inputs, its calls and what they make."""

    def __init__(
        self,
        model: ServedModel,
        cache: KVCache,
        batch: Batch,
        context: PagedAttention,
        specs: tuple[Rotary, ...],
    ) -> None:
        self._numbers = numbers = batch.numbers.clone()
        own: dict[str, Any] = pieces(numbers, len(batch.ids), len(batch.query_lengths))
        inputs = replace(batch, **own, numbers=numbers)
        self._tables: dict[Rotary, Tables] = {
            spec: (cos.clone(), sin.clone())
            for spec, (cos, sin) in ((spec, context.rotation(spec)) for spec in specs)
        }
        recorded = PagedAttention(cache, inputs, self._tables)
        self._program: Program = record(lambda: model(inputs.ids, recorded))
        self.result = self._program.result

    def run(self, batch: Batch, context: PagedAttention, rotations: _Rotations) -> torch.Tensor:
        """Refill the inputs from a batch and its context, and compute."""
        self._numbers.copy_(batch.numbers)
        for spec, kept in self._tables.items():
            rotations.fill(kept, spec, batch, context)
        return self._program.run()


class _Rotations:
    """Tables of positions from 0 on, for sequences that are not extended.

    Torch's cosine wakes all of its threads even for a few rows, which takes longer than the rest of
    a step's preparations, and they stay awake where the kernels' threads should be.
    """

    def __init__(self) -> None:
        self._tables: dict[Rotary, Tables] = {}

    def fill(self, into: Tables, spec: Rotary, batch: Batch, context: PagedAttention) -> None:
        """Put a batch's rows of `spec` into two tensors [tokens, head_dim / 2]."""
        if batch.extensions != (NO_EXTENSION,):
            for kept, table in zip(into, context.rotation(spec), strict=True):
                kept.copy_(table)
            return
        for kept, table in zip(into, self._up_to(spec, batch.end), strict=True):
            torch.index_select(table, 0, batch.positions, out=kept)

    def _up_to(self, spec: Rotary, end: int) -> Tables:
        tables = self._tables.get(spec)
        if tables is None or len(tables[0]) < end:
            count = max(_LEAST_ROTATIONS, 1 << end.bit_length())
            tables = rotary_tables(extended(spec, NO_EXTENSION), torch.arange(count))
            self._tables[spec] = tables
        return tables
