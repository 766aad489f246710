"""Sliding windows: which layers have one, and what a query then sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fakes import tiny_model
from qwenkit.engine.plan import Chunk, Plan
from qwenkit.engine.runner import Runner
from qwenkit.layers.attention import PackedCausal
from qwenkit.models.spec import find

QWEN2: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 8,
    "max_window_layers": 2,
}
MIXTURE = QWEN2 | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
USED = {"use_sliding_window": True}
KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("model_type", "config", "windows"),
    [
        ("qwen2", QWEN2, (None, None, None, None)),
        ("qwen2", QWEN2 | {"use_sliding_window": False}, (None, None, None, None)),
        ("qwen2", QWEN2 | USED, (None, None, 8, 8)),
        ("qwen2", QWEN2 | USED | {"max_window_layers": 0}, (8, 8, 8, 8)),
        ("qwen2", QWEN2 | USED | {"max_window_layers": None}, (None, None, None, None)),
        ("qwen2", QWEN2 | USED | {"sliding_window": None}, (None, None, None, None)),
        ("qwen2", QWEN2 | USED | {"layer_types": KINDS}, (8, None, None, 8)),
        ("qwen3", QWEN2 | USED, (None, None, 8, 8)),
        ("qwen2_moe", MIXTURE | USED, (8, None, None, None)),
        ("qwen3_moe", MIXTURE | USED, (8, 8, 8, 8)),
        ("qwen2_moe", MIXTURE, (None, None, None, None)),
    ],
)
def test_which_layers_have_a_window(
    model_type: str, config: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    read: Any = find(model_type).config(config)
    assert read.windows == windows


def test_a_token_out_of_every_window_changes_nothing() -> None:
    model = tiny_model(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    plain = tiny_model()
    ids = torch.randint(0, 256, (20,), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0] = (ids[0] + 1) % 256
    reach = 2 * (4 - 1)  # through two layers
    before, after = (model(x, PackedCausal([20])) for x in (ids, other))
    assert torch.equal(before[reach + 1 :], after[reach + 1 :])
    assert not torch.equal(before[: reach + 1], after[: reach + 1])
    whole = plain(ids, PackedCausal([20]))
    torch.testing.assert_close(before[:4], whole[:4])
    assert not torch.allclose(before[4:], whole[4:], atol=1e-3)


def test_windows_are_the_same_through_the_paged_cache() -> None:
    model = tiny_model(use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ids = torch.randint(0, 256, (23,), generator=torch.Generator().manual_seed(1))
    expected = model(ids, PackedCausal([23]))
    runner = Runner(
        model, num_blocks=8, block_tokens=4, device=torch.device("cpu"), reference_ops=False
    )
    for start, stop in ((0, 9), (9, 10), (10, 22), (22, 23)):
        chunk = Chunk("a", tuple(ids[start:stop].tolist()), start, (5, 1, 7, 0, 2, 3))
        torch.testing.assert_close(
            runner.run(Plan((chunk,)))[0], expected[stop - 1], rtol=0, atol=2e-4
        )
