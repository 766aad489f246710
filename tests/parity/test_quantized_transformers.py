"""NF4 and LLM.int8 folders that we write, read by transformers with bitsandbytes on a processor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwenkit.bench.random_model import write_random_folder
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import load
from qwenkit.quantize.calibrate import Rows
from qwenkit.quantize.run import quantize
from qwenkit.quantize.settings import QuantizeSettings, Rule
from qwenkit.quantize.stream import LayerSource

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
SHAPE = {
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
        QuantizeSettings(method="nf4"),
        QuantizeSettings(method="nf4", rules=(Rule("o_proj", None),)),
        QuantizeSettings(method="int8"),
    ],
    ids=["nf4", "nf4-kept", "int8"],
)
def test_transformers_gives_the_same_logits(tmp_path: Path, settings: QuantizeSettings) -> None:
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    write_random_folder(tmp_path / "parent", SHAPE)
    nothing = Rows(calibration=(), judging=(), digest="", note="")
    with torch.inference_mode():
        work, _ = quantize(LayerSource(tmp_path / "parent"), nothing, settings, tmp_path / "result")
    work.publish()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "result", device_map="cpu", dtype=torch.float32
    )
    kinds = {type(m).__name__ for m in theirs.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    ids = torch.arange(40)
    ours = load(tmp_path / "result", dtype="float32").model
    with torch.inference_mode():
        y, expected = ours(ids, PackedCausal([40])), theirs(ids[None]).logits[0].float()
    largest = float(y.abs().max())
    # LLM.int8 rounds activations too, and NF4 computes in bf16
    assert torch.allclose(y, expected, rtol=0, atol=0.03 * largest)
    assert float((y - expected).norm() / y.norm()) < 0.02
