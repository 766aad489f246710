"""Random small Qwen2 and Llama models against transformers: logits and gradients in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit.checkpoint import open_checkpoint
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import fill
from qwenkit.models.spec import CausalModel, find

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

TINY = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen2-no-gqa": {"model_type": "qwen2", "num_key_value_heads": 6},
    "qwen2-one-kv-head": {"model_type": "qwen2", "num_key_value_heads": 1, "rope_theta": 5e6},
    "qwen2-eps": {"model_type": "qwen2", "rms_norm_eps": 1e-3},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-bias": {"model_type": "llama", "attention_bias": True},
    "llama-head-dim": {"model_type": "llama", "head_dim": 16},
}


def make_pair(
    variant: dict[str, Any], folder: Path, *, shard: str = "5GB", old_layout: bool = False
) -> tuple[Any, CausalModel]:
    """A random transformers model, and ours read from the checkpoint it saves."""
    torch.manual_seed(0)
    settings = TINY | variant
    config = transformers.AutoConfig.for_model(**settings)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs = theirs.to(torch.float32).eval()
    theirs.save_pretrained(folder, max_shard_size=shard)
    if old_layout:
        text = json.loads((folder / "config.json").read_text())
        text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
        text["torch_dtype"] = text.pop("dtype")
        (folder / "config.json").write_text(json.dumps(text))
    checkpoint = open_checkpoint(folder)
    architecture = find(checkpoint.config["model_type"])
    with torch.device("meta"):
        ours = architecture.build(architecture.config(checkpoint.config))
    ours.dtype = torch.float32
    fill(ours, architecture, checkpoint)
    return theirs, ours


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_agree(name: str, tmp_path: Path) -> None:
    theirs, ours = make_pair(VARIANTS[name], tmp_path)
    ids = torch.randint(0, TINY["vocab_size"], (40,))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]  # [40, vocab]
        got = ours(ids, PackedCausal([40]))  # [40, vocab]
    torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
@pytest.mark.parametrize("old_layout", [False, True])
def test_sharded_files_and_old_config_layout(
    old_layout: bool, model_type: str, tmp_path: Path
) -> None:
    variant = {"model_type": model_type, "tie_word_embeddings": False, "rope_theta": 3e5}
    theirs, ours = make_pair(variant, tmp_path, shard="20KB", old_layout=old_layout)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.randint(0, TINY["vocab_size"], (17,))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        got = ours(ids, PackedCausal([17]))
    torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", ["qwen2-tied", "llama-untied"])
def test_gradients_on_packed_sequences_agree(name: str, tmp_path: Path) -> None:
    theirs, ours = make_pair(VARIANTS[name], tmp_path)
    lengths = [5, 12, 1, 9]
    ids = torch.randint(0, TINY["vocab_size"], (sum(lengths),))
    weights = torch.randn(sum(lengths), TINY["vocab_size"])  # a loss that touches every logit

    for parameter in ours.parameters():
        parameter.requires_grad_(True)
    (ours(ids, PackedCausal(lengths)) * weights).sum().backward()
    theirs.zero_grad()
    for piece, part in zip(ids.split(lengths), weights.split(lengths), strict=True):
        (theirs(piece[None]).logits[0] * part).sum().backward()

    expected = dict(theirs.named_parameters())
    checked = 0
    for path, parameter in ours.named_parameters():
        reference = expected[path].grad
        scale = reference.abs().max().item()
        torch.testing.assert_close(parameter.grad, reference, atol=1e-5 * scale, rtol=0)
        checked += 1
    assert checked == len(expected)
