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

import numpy
import torch
from numpy.typing import NDArray

from qwenkit.engine.batch import Batch, Layout, pieces
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

_CPU = torch.device("cpu")
_NOT_EXTENDED = (NO_EXTENSION,)

# Tokens, sequences, width of the block tables, threads, each token's adapter.
Key = tuple[int, int, int, int, tuple[int, ...]]
Arrays = tuple[NDArray[numpy.float32], NDArray[numpy.float32]]  # cosine and sine


class Replayer:
    """The recorded steps of one model over one cache."""

    def __init__(self, model: ServedModel, cache: KVCache) -> None:
        self._model = model
        self._cache = cache
        self._specs: dict[Key, tuple[Rotary, ...]] = {}
        self._steps: dict[Key, _Step] = {}
        self._rotations = _Rotations()
        self._refused = False

    def run(self, layout: Layout, adapter_keys: tuple[int, ...] = ()) -> torch.Tensor | None:
        """Logits [tokens, vocab_size], overwritten by the next call; None where the step is not one
        that is repeated: then it must be computed as always.
        """
        if self._refused or layout.rows is not None or layout.tokens > _MOST_TOKENS:
            return None
        sizes = layout.tokens, layout.sequences, layout.width
        key = *sizes, torch.get_num_threads(), adapter_keys
        if key in self._steps:
            return self._steps[key].run(layout, self._rotations)
        batch = layout.batch(_CPU)
        context = PagedAttention(self._cache, batch)
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
        self._cache = cache
        numbers = batch.numbers.clone()
        self._numbers = numbers.numpy()
        own: dict[str, Any] = pieces(numbers, len(batch.ids), len(batch.query_lengths))
        inputs = replace(batch, **own, numbers=numbers)
        self._tables: dict[Rotary, Tables] = {
            spec: (cos.clone(), sin.clone())
            for spec, (cos, sin) in ((spec, context.rotation(spec)) for spec in specs)
        }
        recorded = PagedAttention(cache, inputs, self._tables)
        self._program: Program = record(lambda: model(inputs.ids, recorded))
        self.result = self._program.result
        self._filled = {s: (cos.numpy(), sin.numpy()) for s, (cos, sin) in self._tables.items()}

    def run(self, layout: Layout, rotations: _Rotations) -> torch.Tensor:
        """Refill the inputs, and compute."""
        self._numbers[:] = layout.numbers
        if layout.extensions == _NOT_EXTENDED:
            for spec, filled in self._filled.items():
                rotations.fill(filled, spec, layout)
        else:
            context = PagedAttention(self._cache, layout.batch(_CPU))
            for spec, kept in self._tables.items():
                for mine, table in zip(kept, context.rotation(spec), strict=True):
                    mine.copy_(table)
        return self._program.run()


class _Rotations:
    """Tables of positions from 0 on, for sequences that are not extended.

    Torch's cosine wakes all of its threads even for a few rows, which takes longer than the rest of
    a step's preparations, and they stay awake where the kernels' threads should be.
    """

    def __init__(self) -> None:
        self._tables: dict[Rotary, Arrays] = {}

    def fill(self, into: Arrays, spec: Rotary, layout: Layout) -> None:
        """Put the rows of a layout's positions into two arrays [tokens, head_dim / 2]."""
        positions = layout.positions
        for kept, table in zip(into, self._up_to(spec, layout.end), strict=True):
            table.take(positions, 0, kept, "clip")  # all are there; "raise" would copy them twice

    def _up_to(self, spec: Rotary, end: int) -> Arrays:
        tables = self._tables.get(spec)
        if tables is None or len(tables[0]) < end:
            count = max(_LEAST_ROTATIONS, 1 << end.bit_length())
            cos, sin = rotary_tables(extended(spec, NO_EXTENSION), torch.arange(count))
            self._tables[spec] = tables = cos.numpy(), sin.numpy()
        return tables
