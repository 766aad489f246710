"""One forward pass of the model for one plan."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from qwenkit.engine.batch import Batch, build
from qwenkit.engine.key_guard import key_guards
from qwenkit.engine.kv import NAMED_DTYPES, KVCache
from qwenkit.engine.paged import PagedAttention
from qwenkit.engine.replay import Replayer
from qwenkit.engine.scheduler import Plan
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

    @torch.inference_mode()
    def run(self, plan: Plan) -> torch.Tensor:
        """Compute the plan's tokens; return logits [rows, vocab_size], a row for each of
        `plan.sampled_ids`, in whatever dtype the model gives. The next run may overwrite them.
        """
        batch = build(plan, block_tokens=self._cache.block_tokens, device=self._device)
        if self._replayer is not None:
            logits = self._replayer.run(batch)
            if logits is not None:
                return logits
        with reference_only() if self._reference_ops else nullcontext():
            return self._model(batch.ids, self._context(batch))

    @torch.inference_mode()
    def run_pooled(self, plan: Plan) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The same for a plan that wants hidden states as well: logits as from `run`, and for each
        chunk with `hidden` the rows [hidden, hidden_size] of its last tokens.
        """
        batch = build(plan, block_tokens=self._cache.block_tokens, device=self._device)
        with reference_only() if self._reference_ops else nullcontext():
            rows = self._model.hidden(batch.ids, self._context(batch))  # [rows, hidden_size]
            counts = [1 if chunk.sample else chunk.hidden for chunk in plan.chunks]
            pieces = list(zip(plan.chunks, torch.split(rows, counts), strict=True))
            sampled = [piece for chunk, piece in pieces if chunk.sample]
            logits = self._model.logits(torch.cat(sampled) if sampled else rows[:0])
        return logits, [piece for chunk, piece in pieces if chunk.hidden]

    def _context(self, batch: Batch) -> AttentionContext:
        if self._is_split:
            return ByDevice(lambda device: PagedAttention(self._cache, batch.to(device)))
        return PagedAttention(self._cache, batch)
