"""Qwen3 dense models (arXiv 2505.09388): Qwen2 with an RMSNorm over each head's query and key and
without biases. The head size is a number of its own, not hidden_size / heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwenkit.models import qwen2
from qwenkit.models.config_keys import flag
from qwenkit.models.spec import Architecture

HEAD_DIM = 128  # of every published model; what a config.json without the key means


def read_config(config: Mapping[str, Any]) -> qwen2.Config:
    """From a `config.json` dictionary. Raises ConfigError naming the key."""
    bias = flag(config, "attention_bias", False)
    whole = {**config, "head_dim": config.get("head_dim") or HEAD_DIM}
    return dataclasses.replace(
        qwen2.read_config(whole), qkv_bias=bias, output_bias=bias, qk_norm=True
    )


ARCHITECTURE = Architecture(
    model_types=("qwen3",),
    gguf_arch="qwen3",
    config=read_config,
    build=qwen2.Model,
    gguf_names=qwen2.GGUF_NAMES | qwen2.GGUF_QK_NORM,
    lora_targets=qwen2.LORA_TARGETS,
    dialect="hermes",
)
