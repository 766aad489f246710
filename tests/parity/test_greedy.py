"""Greedy generation through the engine against transformers: 200 tokens of each architecture.

The weights are large enough for the text to wander instead of repeating itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import QWEN2_MOE, QWEN3, QWEN3_MOE, TINY, make_pair

from fakes import ByteTokenizer
from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Request
from qwenkit.engine.settings import EngineSettings
from qwenkit.models.spec import CausalModel
from qwenkit.types.events import TokenEvent
from qwenkit.types.sampling import SamplingParams

pytestmark = pytest.mark.oracle

TOKENS = 200
PROMPT_LENGTHS = (1, 9, 40, 64)
NEAR = 1e-5  # a difference does not count when the best two logits are this near
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_moe": QWEN2_MOE | {"decoder_sparse_step": 2},
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On matrices this small threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _ours(model: CausalModel, prompts: list[list[int]], *, together: bool) -> list[list[int]]:
    """Generated ids, all prompts in one batch or one after another."""
    settings = EngineSettings(
        block_tokens=4,
        kv_cache_tokens=2048,
        max_batch_tokens=48 if together else 512,  # together, the longest prompt comes in pieces
        max_sequences=8,
    )
    engine = Engine(model, ByteTokenizer(), settings, stop_token_ids=(), context_tokens=512)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS)
    generated: list[list[int]] = [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), tuple(prompt), sampling))
        while engine.has_work and (not together or number == len(prompts) - 1):
            for event in engine.step():
                if isinstance(event, TokenEvent):
                    generated[int(event.request_id)].append(event.token_id)
    return generated


def _theirs(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
    )
    generated: list[int] = output[0, len(prompt) :].tolist()
    return generated


def _assert_same(model: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> None:
    """Equal, or different from a place on where either token was as good as the other."""
    assert len(ours) == len(theirs) == TOKENS
    assert len(set(theirs)) >= 20
    place = next((i for i in range(TOKENS) if ours[i] != theirs[i]), None)
    if place is not None:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + theirs[:place]])).logits[0, -1]
        best = logits.topk(2).values.tolist()
        assert best[0] - best[1] < NEAR, f"token {place}: {ours[place]} for {theirs[place]}"


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_tokens_are_theirs(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name] | {"max_position_embeddings": 512}
    theirs, ours = make_pair(variant, tmp_path, std=1.0)
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    prompts = [torch.randint(0, TINY["vocab_size"], (n,)).tolist() for n in PROMPT_LENGTHS]
    expected = [_theirs(theirs, prompt) for prompt in prompts]
    for together in (False, True):
        generated = _ours(ours, prompts, together=together)
        for prompt, mine, reference in zip(prompts, generated, expected, strict=True):
            _assert_same(theirs, prompt, mine, reference)
