"""Sliding windows of random small models against transformers, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import QWEN2_MOE, QWEN3, QWEN3_MOE, TINY, make_pair

from qwenkit.layers.attention import PackedCausal

pytestmark = pytest.mark.oracle

QWEN2 = {"model_type": "qwen2"}
WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2-upper-layers": QWEN2 | WINDOW,
    "qwen2-all-layers": QWEN2 | WINDOW | {"max_window_layers": 0},
    "qwen2-no-layer": QWEN2 | WINDOW | {"max_window_layers": 3},
    "qwen2-one-token": QWEN2 | WINDOW | {"sliding_window": 1},
    "qwen2-dead": QWEN2 | WINDOW | {"use_sliding_window": False},
    "qwen2-layer-types": QWEN2 | WINDOW | {"layer_types": KINDS},
    "qwen3-upper-layers": QWEN3 | WINDOW,
    "qwen2-moe": QWEN2_MOE | WINDOW | {"max_window_layers": 2},
    "qwen2-moe-dead": QWEN2_MOE | WINDOW | {"use_sliding_window": False},
    "qwen3-moe": QWEN3_MOE | WINDOW,
    "qwen3-moe-dead": QWEN3_MOE | WINDOW | {"use_sliding_window": False},
}


@pytest.mark.parametrize("old_layout", [False, True], ids=["new-layout", "old-layout"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_agree(name: str, old_layout: bool, tmp_path: Path) -> None:
    theirs, ours = make_pair(VARIANTS[name], tmp_path, old_layout=old_layout)
    ids = torch.randint(0, TINY["vocab_size"], (40,))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]  # [40, vocab]
        got = ours(ids, PackedCausal([40]))  # [40, vocab]
    torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
