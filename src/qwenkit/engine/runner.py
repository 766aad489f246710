"""One forward pass of the model for one plan."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch

from qwenkit.engine.adapters import LoadedAdapters
from qwenkit.engine.batch import Batch, build, lay_out
from qwenkit.engine.diagnose import locate
from qwenkit.engine.key_guard import key_guards
from qwenkit.engine.kv import NAMED_DTYPES, KVCache
from qwenkit.engine.paged import PagedAttention
from qwenkit.engine.plan import Chunk, Plan
from qwenkit.engine.replay import Replayer
from qwenkit.engine.served import ServedModel
from qwenkit.kernels.ops.packed_matmul import packed_matmul
from qwenkit.kernels.registry import reference_only
from qwenkit.layers.attention import AttentionContext, ByDevice


@dataclass(frozen=True)
class Rows:
    """What came of a plan's `chunks`: their rows one after another, `logits` [n, vocab_size] and,
    of chunks that want them, `hidden` states [m, hidden_size].
    """

    chunks: Sequence[Chunk]
    logits: torch.Tensor
    hidden: torch.Tensor | None = None

    def of(self, index: int) -> torch.Tensor:
        """The rows of one chunk, [chunk.rows, vocab_size] or [chunk.rows, hidden_size]."""
        chunk, end = self.chunks[index], self._ends[index]
        rows = self.hidden if chunk.hidden and self.hidden is not None else self.logits
        return rows[end - chunk.rows : end]

    @cached_property
    def _ends(self) -> list[int]:
        """Where the rows of each chunk end among those of its kind."""
        ends, counts = [], {False: 0, True: 0}
        for chunk in self.chunks:
            counts[chunk.hidden] += chunk.rows
            ends.append(counts[chunk.hidden])
        return ends


NO_ROWS = Rows((), torch.empty(0, 0))


class Runner:
    """A model on `device` and its KV cache of `num_blocks` blocks; `reference_ops` and
    `kv_dtype` as in the engine's settings. Of a model split over several devices `device` is that
    of the embedding and `layer_devices` is each layer's.
    """

    def __init__(
        self,
        model: ServedModel,
        *,
        num_blocks: int,
        block_tokens: int,
        device: torch.device,
        reference_ops: bool,
        layer_devices: Sequence[torch.device] | None = None,
        kv_dtype: str = "auto",
    ) -> None:
        self._model = model
        self._reference_ops = reference_ops
        self._device = device
        kept = NAMED_DTYPES.get(kv_dtype, model.dtype)
        self._cache = KVCache(
            num_layers=model.config.num_hidden_layers,
            num_blocks=num_blocks,
            block_tokens=block_tokens,
            kv_heads=model.config.num_key_value_heads,
            head_dim=model.config.head_dim,
            dtype=kept,
            device=device,
            layer_devices=layer_devices,
            guards=None if kept.is_floating_point else key_guards(model),
        )
        self._is_split = layer_devices is not None
        native = (
            not self._is_split
            and not reference_ops
            and device.type == "cpu"
            and "cpu" in packed_matmul.backends
        )
        self._replayer = Replayer(model, self._cache) if native else None
        self._native = native
        self._adapted_replayer: Replayer | None = None
        self.adapters = LoadedAdapters(model, native=native)

    def adapters_changed(self) -> None:
        """Record anew the steps that need adapters: those recorded hold on to what is unloaded."""
        replays = self._native and self.adapters.names
        self._adapted_replayer = Replayer(self.adapters.model, self._cache) if replays else None

    @torch.inference_mode()
    def run(self, plan: Plan, adapter_keys: Sequence[int] = ()) -> torch.Tensor:
        """Compute the plan's tokens; return logits [rows, vocab_size], those that the chunks want
        one after another, in whatever dtype the model gives. The next run may overwrite them.
        `adapter_keys` has the key of each chunk's adapter; empty: nobody has one.
        """
        model, keys = self._choose_model(plan, adapter_keys)
        replayer = self._adapted_replayer if keys else self._replayer
        rounded = replayer is not None
        layout = lay_out(plan, block_tokens=self._cache.block_tokens, rounded=rounded)
        if replayer is not None:
            logits = replayer.run(layout, keys)
            if logits is not None:
                return logits
        batch = layout.batch(self._device)
        with reference_only() if self._reference_ops else nullcontext():
            return model(batch.ids, self._context(batch))

    @torch.inference_mode()
    def rows(self, plan: Plan, adapter_keys: Sequence[int] = ()) -> Rows:
        """The same, and hidden states where they are wanted."""
        if not any(chunk.hidden for chunk in plan.chunks):
            return Rows(plan.chunks, self.run(plan, adapter_keys))
        model, _ = self._choose_model(plan, adapter_keys)
        batch = build(plan, block_tokens=self._cache.block_tokens, device=self._device)
        is_hidden = torch.tensor(
            [c.hidden for c in plan.chunks for _ in range(c.rows)], dtype=torch.bool
        )
        with reference_only() if self._reference_ops else nullcontext():
            states = model.hidden(batch.ids, self._context(batch))  # [rows, hidden_size]
            hidden, others = states[is_hidden], states[~is_hidden]
            logits = model.logits(others) if len(others) else hidden[:0]
        return Rows(plan.chunks, logits, hidden)

    def _choose_model(
        self, plan: Plan, adapter_keys: Sequence[int]
    ) -> tuple[ServedModel, tuple[int, ...]]:
        """What computes a plan, and the key of each token's adapter (empty: nobody has one)."""
        if not self.adapters.choose(adapter_keys, plan.chunks):
            return self._model, ()
        pairs = zip(adapter_keys, plan.chunks, strict=True)
        return self.adapters.model, tuple(k for k, chunk in pairs for _ in chunk.token_ids)

    @torch.inference_mode()
    def locate(self, chunk: Chunk, prompt_ids: Sequence[int], adapter_key: int = 0) -> str:
        """One sentence on where NaN or infinity arose in a computed chunk of a sequence, some rows
        of which are not finite. Earlier than the chunk it was in the prompt: a token that was
        sampled from had finite logits.
        """
        model = self._model

        def compute(at: int) -> None:
            known = prompt_ids[at] if at < chunk.start else chunk.token_ids[at - chunk.start]
            token = Chunk(chunk.request_id, (known,), at, chunk.blocks, extension=chunk.extension)
            plan = Plan((token,))
            self._choose_model(plan, (adapter_key,))  # says which rows have the adapter
            batch = build(plan, block_tokens=self._cache.block_tokens, device=self._device)
            with reference_only() if self._reference_ops else nullcontext():
                model(batch.ids, self._context(batch))

        if adapter_key:
            model = self.adapters.model
        position = chunk.start + len(chunk.token_ids) - 1
        return locate(model, self._cache, chunk.blocks, position, compute)

    def _context(self, batch: Batch) -> AttentionContext:
        if self._is_split:
            return ByDevice(lambda device: PagedAttention(self._cache, batch.to(device)))
        return PagedAttention(self._cache, batch)
