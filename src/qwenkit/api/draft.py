"""A smaller model of the same vocabulary, loaded to guess for another."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch

from qwenkit.engine.draft_model import DraftModel
from qwenkit.engine.runner import Runner
from qwenkit.engine.settings import EngineSettings
from qwenkit.errors import UsageError
from qwenkit.load import Loaded
from qwenkit.types.protocols import Tokenizer


def make_drafter(
    draft: Loaded, target: Loaded, settings: EngineSettings, device: torch.device
) -> DraftModel:
    """The drafter over `draft` for an engine of `settings` over `target`, with a cache as large.

    Raises UsageError where the two have other tokens.
    """
    _check_vocabulary(draft.tokenizer, target.tokenizer, draft.checkpoint.path)
    num_blocks = settings.num_blocks(target.record.context_tokens)
    runner = Runner(
        draft.model,
        num_blocks=num_blocks,
        block_tokens=settings.block_tokens,
        device=device,
        reference_ops=settings.reference_ops,
        kv_dtype=settings.kv_dtype,
    )
    return DraftModel(
        runner,
        num_blocks=num_blocks,
        block_tokens=settings.block_tokens,
        context_tokens=draft.record.context_tokens,
        vocab_size=draft.tokenizer.vocab_size,
        cost=_bytes(draft.model) / _bytes(target.model),
    )


def _check_vocabulary(draft: Tokenizer, target: Tokenizer, path: Path) -> None:
    if draft.vocab_size != target.vocab_size:
        raise UsageError(
            f"draft: {path} has {draft.vocab_size} tokens, the model {target.vocab_size}; a draft "
            "model must have the same vocabulary."
        )
    for token_id in range(target.vocab_size):
        ours, theirs = target.token_bytes(token_id), draft.token_bytes(token_id)
        if ours != theirs:
            raise UsageError(
                f"draft: token {token_id} of {path} is {theirs!r}, of the model {ours!r}; a draft "
                "model must have the same vocabulary."
            )


def _bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights, of which a step of one token reads nearly all."""
    return sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
