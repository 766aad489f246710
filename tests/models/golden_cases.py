"""Golden models, their reference logits, and forwards through the paged cache of serving."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from qwenkit.checkpoint.safetensors import read_safetensors
from qwenkit.engine.batch import build
from qwenkit.engine.kv import KVCache
from qwenkit.engine.paged import PagedAttention
from qwenkit.engine.plan import Chunk, Plan
from qwenkit.engine.request import Limits, Request
from qwenkit.kernels import cpu
from qwenkit.kernels.registry import reference_only
from qwenkit.models.spec import CausalModel, find
from qwenkit.types.sampling import SamplingParams

BLOCK_TOKENS = 4


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in read_safetensors(file).items()}


def golden_model(folder: Path, **changes: Any) -> CausalModel:
    """The model of a golden folder in fp32, `changes` replacing keys of its config.json."""
    config = json.loads((folder / "config.json").read_text()) | changes
    architecture = find(config["model_type"])
    model = architecture.build(architecture.config(config))
    model.load_state_dict(read_tensors(folder / "model.safetensors"))
    model.dtype = torch.float32
    return model.requires_grad_(False).eval()


def worst(logits: torch.Tensor, reference: Mapping[str, torch.Tensor], case: str) -> float:
    """The largest difference in the rows that the reference has, as a share of its largest logit.

    `logits` are [tokens, vocab_size], one row for each token of the case.
    """
    expected = reference[case]
    got = logits[reference[f"{case}.rows"].long()]
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


def paged_logits(
    model: CausalModel,
    sequences: Sequence[torch.Tensor],
    cuts: Sequence[Sequence[int]],
    *,
    native: bool = False,
) -> list[torch.Tensor]:
    """All logits of several sequences, served together; `cuts` are the ends of their chunks.

    The first chunks of a sequence, up to the first cut, are its prompt: what a request is extended
    by is decided from its length, as the engine does. `native`: by this machine's kernels.
    """
    if native:
        cpu.register()
    blocks_each = max(-(-len(ids) // BLOCK_TOKENS) for ids in sequences)
    cache = KVCache(
        num_layers=model.config.num_hidden_layers,
        num_blocks=blocks_each * len(sequences),
        block_tokens=BLOCK_TOKENS,
        kv_heads=model.config.num_key_value_heads,
        head_dim=model.config.head_dim,
        dtype=model.dtype,
        device=torch.device("cpu"),
    )
    rows: list[list[torch.Tensor]] = [[] for _ in sequences]
    chunks = [_chunks(model, ids, ends) for ids, ends in zip(sequences, cuts, strict=True)]
    for step in range(max(map(len, chunks))):
        part = [(n, c[step]) for n, c in enumerate(chunks) if step < len(c)]
        placed = [
            dataclasses.replace(
                chunk, blocks=tuple(range(n * blocks_each, (n + 1) * blocks_each))[::-1]
            )
            for n, chunk in part
        ]
        batch = build(Plan(tuple(placed)), block_tokens=BLOCK_TOKENS, device=torch.device("cpu"))
        batch = dataclasses.replace(batch, rows=None)  # every token's logits, not the last ones'
        with nullcontext() if native else reference_only():
            logits = model(batch.ids, PagedAttention(cache, batch))  # [tokens, vocab_size]
        lengths = [len(chunk.token_ids) for chunk in placed]
        for (n, _), piece in zip(part, logits.split(lengths), strict=True):
            rows[n].append(piece)
    return [torch.cat(pieces) for pieces in rows]


def _chunks(model: CausalModel, ids: torch.Tensor, ends: Sequence[int]) -> list[Chunk]:
    longest = model.config.max_position_embeddings
    limits = Limits(
        context_tokens=longest,
        cache_tokens=longest,
        vocab_size=model.config.vocab_size,
        position=model.config.position,
        trained_tokens=longest,
    )
    prompt = tuple(ids[: ends[0]].tolist())
    extension = limits.extension(
        Request("case", prompt, SamplingParams(max_tokens=max(1, len(ids) - ends[0])))
    )
    halves = [0, ends[0] // 2, *ends] if ends[0] > 1 else [0, *ends]  # the prompt in two pieces
    return [
        Chunk("case", tuple(ids[a:b].tolist()), a, (), 1, extension) for a, b in pairwise(halves)
    ]
