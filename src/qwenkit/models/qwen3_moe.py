"""Qwen3 mixtures such as Qwen3-30B-A3B (arXiv 2505.09388): normalised queries and keys, no shared
expert, and no biases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwenkit.models import mixture, qwen2
from qwenkit.models.config_keys import flag
from qwenkit.models.config_window import every_layer, layer_windows
from qwenkit.models.spec import Architecture


def read_config(config: Mapping[str, Any]) -> mixture.Config:
    """From a `config.json` dictionary. Raises ConfigError naming the key."""
    bias = flag(config, "attention_bias", False)
    read = mixture.read_config(config, shared_expert=False)
    return dataclasses.replace(
        read,
        windows=layer_windows(config, read.num_hidden_layers, slides=every_layer),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )


ARCHITECTURE = Architecture(
    model_types=("qwen3_moe",),
    gguf_arch="qwen3moe",
    config=read_config,
    build=mixture.build,
    gguf_names=qwen2.GGUF_NAMES | qwen2.GGUF_QK_NORM | mixture.GGUF_NAMES,
    lora_targets=mixture.LORA_TARGETS,
    dialect="hermes",
)
