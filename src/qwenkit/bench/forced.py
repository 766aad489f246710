"""Whole windows of a text through the paged cache, as serving computes them, with the logits of
every token: what is measured of a model while the text decides how it goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from qwenkit.engine.batch import build
from qwenkit.engine.kv import KVCache
from qwenkit.engine.paged import PagedAttention
from qwenkit.engine.plan import Chunk, Plan
from qwenkit.load import Loaded
from qwenkit.types.extension import Extension

BLOCK_TOKENS = 16
CHUNK_TOKENS = 256  # rows of logits at a time: they are as wide as the vocabulary


class ForcedPass:
    """One window `ids` of at least two tokens, computed piece by piece in the order of `starts`.

    Keys and values are kept as `dtype` (None: what the model computes in), keys guarded by
    `guards`.
    """

    def __init__(
        self,
        loaded: Loaded,
        ids: Sequence[int],
        extension: Extension,
        *,
        dtype: torch.dtype | None = None,
        guards: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        self._model, config = loaded.model, loaded.config
        self._ids, self._extension = ids, extension
        self._blocks = tuple(range(-(-len(ids) // BLOCK_TOKENS)))
        self.cache = KVCache(
            num_layers=config.num_hidden_layers,
            num_blocks=len(self._blocks),
            block_tokens=BLOCK_TOKENS,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=loaded.model.dtype if dtype is None else dtype,
            device=torch.device("cpu"),
            guards=guards,
        )

    @property
    def starts(self) -> Iterator[int]:
        """Where the pieces begin."""
        return iter(range(0, len(self._ids) - 1, CHUNK_TOKENS))

    @torch.inference_mode()
    def piece(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [tokens, vocab_size] of the piece's tokens, and the tokens [tokens] after them; of
        the window's last token there are none.
        """
        part = tuple(self._ids[start : start + CHUNK_TOKENS])
        plan = Plan((Chunk("window", part, start, self._blocks, 1, self._extension),))
        batch = build(plan, block_tokens=BLOCK_TOKENS, device=torch.device("cpu"))
        targets = torch.tensor(self._ids[start + 1 : start + 1 + len(part)])
        logits = self._model(batch.ids, _EveryRow(self.cache, batch))
        return logits[: len(targets)], targets


class _EveryRow(PagedAttention):
    """A context that wants the logits of every token."""

    def select(self, hidden: torch.Tensor) -> torch.Tensor:
        """All of it."""
        return hidden
