"""What the engine asks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

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

    A call is `logits` of `hidden`, which is [rows, hidden_size]. `dtype` is what it computes in,
    and so what keys and values are kept in; `key_sizes` is `CausalModel`'s.
    """

    @property
    def config(self) -> ServedConfig: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __call__(self, ids: torch.Tensor, context: AttentionContext) -> torch.Tensor: ...
    def hidden(self, ids: torch.Tensor, context: AttentionContext) -> torch.Tensor: ...
    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...
    def key_sizes(self) -> Sequence[torch.Tensor | None]: ...
