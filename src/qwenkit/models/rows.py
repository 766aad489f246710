"""More rows for a built model's vocabulary: in its embedding and in its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from qwenkit.layers.linear import Embedding, Linear
from qwenkit.layers.weight import QuantWeight
from qwenkit.models.spec import CausalModel


def fill_rows(model: CausalModel, rows: int, pieces: Mapping[int, Sequence[int]]) -> None:
    """Give the embedding and the head `rows` rows, of which row `id` becomes the mean of the rows
    `pieces[id]`: of the tokens that spelt the text which `id` now stands for.

    Other rows beyond the old ones are the mean of all old ones, so that their logits are no better
    than average. A quantized matrix becomes plain numbers in `model.dtype`. Meant for saving:
    `model.config` stays as it is.
    """
    embedding = next(m for m in model.modules() if isinstance(m, Embedding))
    head = model.get_submodule("lm_head")
    assert isinstance(head, Linear)
    tied = head.weight is embedding.weight
    embedding.weight = _filled(embedding.weight, rows, pieces, model.dtype)
    embedding.num_embeddings = rows
    head.weight = embedding.weight if tied else _filled(head.weight, rows, pieces, model.dtype)
    head.out_features = rows


def _filled(
    weight: nn.Parameter | QuantWeight,
    rows: int,
    pieces: Mapping[int, Sequence[int]],
    dtype: torch.dtype,
) -> nn.Parameter:
    old = weight.dequantize(dtype) if isinstance(weight, QuantWeight) else weight.detach()
    new = torch.empty(rows, old.shape[1], dtype=old.dtype)  # [rows, hidden_size]
    new[: len(old)] = old
    new[len(old) :] = old.mean(0, dtype=torch.float32)
    for token_id, spelt in pieces.items():
        new[token_id] = old[torch.tensor(spelt)].mean(0, dtype=torch.float32)
    return nn.Parameter(new, requires_grad=False)
