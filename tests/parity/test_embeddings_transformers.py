"""Embeddings through the engine against the last hidden states of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import QWEN2_MOE, QWEN3, TINY, make_pair

from fakes import ByteTokenizer
from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Request
from qwenkit.engine.settings import EngineSettings
from qwenkit.types.embedding import POOLINGS, EmbeddingParams
from qwenkit.types.events import FinishEvent

pytestmark = pytest.mark.oracle

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_vectors_are_theirs(name: str, tmp_path: Path) -> None:
    theirs, ours = make_pair(VARIANTS[name], tmp_path)
    prompts = [torch.randint(0, TINY["vocab_size"], (n,)) for n in (1, 8, 30, 100)]
    settings = EngineSettings(
        block_tokens=4, kv_cache_tokens=1024, max_batch_tokens=24, max_sequences=8
    )
    engine = Engine(ours, ByteTokenizer(), settings, stop_token_ids=(), context_tokens=256)
    expected: dict[str, torch.Tensor] = {}
    for number, ids in enumerate(prompts):
        with torch.no_grad():
            hidden = theirs.model(ids[None]).last_hidden_state[0]  # [tokens, hidden_size]
        for pooling in POOLINGS:
            vector = hidden[-1] if pooling == "last" else hidden.mean(0)
            for normalize in (False, True):
                key = f"{number} {pooling} {normalize}"
                expected[key] = vector / vector.norm() if normalize else vector
                wanted = EmbeddingParams(pooling=pooling, normalize=normalize)
                engine.add(Request(key, tuple(ids.tolist()), embedding=wanted))
    found: dict[str, FinishEvent] = {}
    while engine.has_work:
        for event in engine.step():
            assert isinstance(event, FinishEvent)
            found[event.request_id] = event
    assert found.keys() == expected.keys()
    for key, vector in expected.items():
        assert found[key].embedding is not None
        got = torch.tensor(found[key].embedding)
        torch.testing.assert_close(got, vector, rtol=0, atol=2e-5 * vector.abs().max().item())
