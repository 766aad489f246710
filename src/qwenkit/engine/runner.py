"""One forward pass of the model for one plan, and what the engine asks of a model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch

from qwenkit.engine.batch import build
from qwenkit.engine.kv import KVCache
from qwenkit.engine.paged import PagedAttention
from qwenkit.engine.scheduler import Plan
from qwenkit.kernels.registry import reference_only
from qwenkit.layers.attention import AttentionContext
from qwenkit.layers.position import Position


class ServedConfig(Protocol):
    """The shapes that the engine reads of a model's config."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def position(self) -> Position: ...


class ServedModel(Protocol):
    """A built model: flat ids [tokens] and a context in, logits [rows, vocab_size] out.

    `dtype` is what it computes in, and so what keys and values are kept in.
    """

    @property
    def config(self) -> ServedConfig: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __call__(self, ids: torch.Tensor, context: AttentionContext) -> torch.Tensor: ...


class Runner:
    """A model on `device` and its KV cache of `num_blocks` blocks; `reference_ops` as in the
    engine's settings.
    """

    def __init__(
        self,
        model: ServedModel,
        *,
        num_blocks: int,
        block_tokens: int,
        device: torch.device,
        reference_ops: bool,
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
            dtype=model.dtype,
            device=device,
        )

    @torch.inference_mode()
    def run(self, plan: Plan) -> torch.Tensor:
        """Compute the plan's tokens; return logits [rows, vocab_size], a row for each of
        `plan.sampled_ids`, in whatever dtype the model gives.
        """
        batch = build(plan, block_tokens=self._cache.block_tokens, device=self._device)
        with reference_only() if self._reference_ops else nullcontext():
            return self._model(batch.ids, PagedAttention(self._cache, batch))
