"""GPTQ and AWQ folders that we write, read by transformers with GPTQModel on a processor.

GPTQModel pins newer packages than the oracle extra has, so that it is not part of it; where it and
optimum are installed, this runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantized_made import write_quantized_random
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import load
from qwenkit.quantize.settings import QuantizeSettings, Rule

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
SHAPE: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 600,
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    "settings",
    [
        QuantizeSettings(bits=4),
        QuantizeSettings(bits=8, group_size=32),
        QuantizeSettings(bits=4, act_order=True, group_size=64),
        QuantizeSettings(method="rtn", bits=4, symmetric=False),
        QuantizeSettings(method="rtn", bits=4, rules=(Rule("down_proj", 8), Rule("k_proj", None))),
        QuantizeSettings(method="awq", group_size=64),
    ],
    ids=["gptq", "eight", "act-order", "zero-points", "mixed", "awq"],
)
def test_transformers_gives_the_same_logits(tmp_path: Path, settings: QuantizeSettings) -> None:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    from gptqmodel import BACKEND, GPTQModel
    from transformers import AutoModelForCausalLM

    path = write_quantized_random(tmp_path, settings, SHAPE)
    if settings.rules:  # transformers does not look at `dynamic`, GPTQModel itself does
        how = {"device": "cpu", "backend": BACKEND.TORCH, "dtype": torch.bfloat16}
        theirs = GPTQModel.load(str(path), **how).model
    else:
        theirs = AutoModelForCausalLM.from_pretrained(path, device_map="cpu", dtype=torch.bfloat16)
    ours = load(path, dtype="float32").model
    ids = torch.arange(40)
    with torch.inference_mode():
        y, expected = ours(ids, PackedCausal([40])), theirs(ids[None]).logits[0].float()
    kinds = {type(m).__name__ for m in theirs.modules() if hasattr(m, "qweight")}
    assert kinds
    assert torch.allclose(y, expected, rtol=0, atol=0.02 * float(y.abs().max()))  # bf16
