"""One forward pass of the model for one plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from qwenkit.engine.batch import Batch, build
from qwenkit.engine.diagnose import locate
from qwenkit.engine.kv import NAMED_DTYPES, KVCache
from qwenkit.engine.paged import PagedAttention
from qwenkit.engine.replay import Replayer
from qwenkit.engine.scheduler import Chunk, Plan
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
    def locate(self, chunk: Chunk, prompt_ids: Sequence[int], position: int) -> str:
        """One sentence on where NaN or infinity arose in a computed chunk of a sequence, the logits
        of whose token at `position` are not finite. Earlier than the chunk it was in the prompt:
        a token that was sampled from had finite logits.
        """

        def compute(at: int) -> None:
            known = prompt_ids[at] if at < chunk.start else chunk.token_ids[at - chunk.start]
            token = dataclasses.replace(chunk, token_ids=(known,), start=at, sample=True)
            plan = Plan((token,))
            batch = build(plan, block_tokens=self._cache.block_tokens, device=self._device)
            with reference_only() if self._reference_ops else nullcontext():
                self._model(batch.ids, self._context(batch))

        return locate(self._model, self._cache, chunk.blocks, position, compute)

    def _context(self, batch: Batch) -> AttentionContext:
        if self._is_split:
            return ByDevice(lambda device: PagedAttention(self._cache, batch.to(device)))
        return PagedAttention(self._cache, batch)
