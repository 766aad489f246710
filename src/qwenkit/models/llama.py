"""Llama-style decoders, among them SmolLM2 (arXiv 2302.13971): Qwen2 without biases on q, k and v.

GGUF files of this architecture store the rows of q and k in pairwise rotary order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwenkit.models import qwen2
from qwenkit.models.config_keys import flag, only
from qwenkit.models.spec import Architecture


def read_config(config: Mapping[str, Any]) -> qwen2.Config:
    """From a `config.json` dictionary. Raises ConfigError naming the key."""
    only(config, "mlp_bias", False)
    only(config, "use_sliding_window", False)
    bias = flag(config, "attention_bias", False)
    return dataclasses.replace(qwen2.read_config(config), qkv_bias=bias, output_bias=bias)


ARCHITECTURE = Architecture(
    model_types=("llama",),
    gguf_arch="llama",
    config=read_config,
    build=qwen2.Model,
    gguf_names=qwen2.GGUF_NAMES,
    gguf_interleaved=("attn_q", "attn_k"),
    ignored=("rotary_emb.inv_freq",),
    lora_targets=qwen2.LORA_TARGETS,
)
