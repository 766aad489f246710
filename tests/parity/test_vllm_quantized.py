"""GPTQ and AWQ folders that we write, read by vLLM on a processor.

vLLM's CPU wheel is 3.5 GB and no part of the oracle extra: this runs where `qwenkit bench serving
--part http --peer vllm --make-peers` has made its environment.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from quantized_made import write_quantized_random
from qwenkit.bench.environments import launch_prefix, python_for
from qwenkit.cli.bench_options import cache_folder
from qwenkit.errors import QwenkitError
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import load
from qwenkit.quantize.settings import QuantizeSettings, Rule

pytestmark = pytest.mark.oracle
SHAPE: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 600,
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
}
IDS = list(range(40))


def read_by_vllm(folder: Path) -> torch.Tensor:
    """See vllm_logprobs.py; skips where vLLM is not."""
    try:
        python = python_for("vllm", cache_folder() / "peers")
    except QwenkitError as error:
        pytest.skip(str(error))
    script = Path(__file__).with_name("vllm_logprobs.py")
    command = [*launch_prefix("vllm", 2), python, str(script), str(folder)]
    command.append(",".join(str(each) for each in IDS))
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("said ")]
    assert lines, done.stderr[-3000:]
    return torch.tensor(json.loads(lines[0].removeprefix("said ")))


@pytest.mark.parametrize(
    "settings",
    [
        QuantizeSettings(bits=4),
        QuantizeSettings(method="rtn", bits=4, rules=(Rule("down_proj", None),)),
        QuantizeSettings(method="awq", group_size=64),
    ],
    ids=["gptq", "mixed", "awq"],
)
def test_vllm_gives_the_same_probabilities(tmp_path: Path, settings: QuantizeSettings) -> None:
    path = write_quantized_random(tmp_path, settings, SHAPE)
    theirs = read_by_vllm(path)
    ours = load(path, dtype="float32").model
    parent = load(tmp_path / "parent", dtype="float32").model
    following = torch.tensor(IDS[1:])

    def said(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            logits = model(torch.tensor(IDS), PackedCausal([len(IDS)])).float()
        return logits.log_softmax(-1)[:-1].gather(1, following[:, None])[:, 0]

    apart = float((said(ours) - theirs).abs().max())
    from_parent = float((said(parent) - theirs).abs().max())
    assert apart < 0.05  # bf16
    assert apart < from_parent / 4
