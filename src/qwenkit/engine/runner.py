"""One forward pass of the model for one plan."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from qwenkit.engine.adapters import LoadedAdapters
from qwenkit.engine.batch import Batch, build
from qwenkit.engine.kv import NAMED_DTYPES, KVCache
from qwenkit.engine.paged import PagedAttention
from qwenkit.engine.plan import Plan
from qwenkit.engine.replay import Replayer
from qwenkit.engine.served import ServedModel
from qwenkit.kernels.ops.packed_matmul import packed_matmul
from qwenkit.kernels.registry import reference_only
from qwenkit.layers.attention import AttentionContext, ByDevice


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
        self._cache = KVCache(
            num_layers=model.config.num_hidden_layers,
            num_blocks=num_blocks,
            block_tokens=block_tokens,
            kv_heads=model.config.num_key_value_heads,
            head_dim=model.config.head_dim,
            dtype=NAMED_DTYPES.get(kv_dtype, model.dtype),
            device=device,
            layer_devices=layer_devices,
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
        model, replayer = self._model, self._replayer
        keys: tuple[int, ...] = ()  # of each token
        if self.adapters.choose(adapter_keys, plan.chunks):
            pairs = zip(adapter_keys, plan.chunks, strict=True)
            keys = tuple(key for key, chunk in pairs for _ in chunk.token_ids)
            model, replayer = self.adapters.model, self._adapted_replayer
        batch = build(plan, block_tokens=self._cache.block_tokens, device=self._device)
        if replayer is not None:
            logits = replayer.run(batch, keys)
            if logits is not None:
                return logits
        with reference_only() if self._reference_ops else nullcontext():
            logits = model(batch.ids, self._context(batch))
            return logits

    def _context(self, batch: Batch) -> AttentionContext:
        if self._is_split:
            return ByDevice(lambda device: PagedAttention(self._cache, batch.to(device)))
        return PagedAttention(self._cache, batch)
