"""Random small models of transformers, and ours read from the checkpoints that they save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit.checkpoint import open_checkpoint
from qwenkit.fill import fill
from qwenkit.models.spec import CausalModel, find

transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
QWEN2_MOE: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
QWEN3: dict[str, Any] = {"model_type": "qwen3", "head_dim": 16}
QWEN3_MOE: dict[str, Any] = QWEN3 | {
    "model_type": "qwen3_moe",
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


def make_pair(
    variant: dict[str, Any],
    folder: Path,
    *,
    shard: str = "5GB",
    old_layout: bool = False,
    stacked: bool = False,
    std: float = 0.3,
) -> tuple[Any, CausalModel]:
    """A random transformers model with the settings of `TINY` and `variant`, and ours.

    `old_layout` is that of config.json before transformers 5; `stacked` saves a mixture's experts
    as transformers 5 holds them and not as they are published.
    """
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**(TINY | variant))
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=std)
    theirs = theirs.to(torch.float32).eval()
    theirs.save_pretrained(folder, max_shard_size=shard, save_original_format=not stacked)
    if old_layout:
        text = json.loads((folder / "config.json").read_text())
        text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
        text["torch_dtype"] = text.pop("dtype")
        (folder / "config.json").write_text(json.dumps(text))
    return theirs, read_model(folder)


def read_model(path: Path) -> CausalModel:
    """Our model of a checkpoint without a tokenizer, in fp32."""
    checkpoint = open_checkpoint(path)
    architecture = find(checkpoint.config["model_type"])
    with torch.device("meta"):
        model = architecture.build(architecture.config(checkpoint.config))
    model.dtype = torch.float32
    fill(model, architecture, checkpoint)
    return model
