"""Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B (arXiv 2407.10671): Qwen2 with a mixture of experts, among
them one shared by all tokens behind a sigmoid gate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwenkit.models import mixture, qwen2
from qwenkit.models.config_keys import flag
from qwenkit.models.config_window import every_second_below, layer_windows
from qwenkit.models.spec import Architecture


def read_config(config: Mapping[str, Any]) -> mixture.Config:
    """From a `config.json` dictionary. Raises ConfigError naming the key."""
    bias = flag(config, "qkv_bias", True)
    read = mixture.read_config(config, shared_expert=True)
    windows = layer_windows(config, read.num_hidden_layers, slides=every_second_below)
    return dataclasses.replace(read, qkv_bias=bias, windows=windows)


GGUF_NAMES = {
    "blk.{}.ffn_gate_inp_shexp.weight": "model.layers.{}.mlp.shared_expert_gate.weight",
    "blk.{}.ffn_gate_shexp.weight": "model.layers.{}.mlp.shared_expert.gate_proj.weight",
    "blk.{}.ffn_up_shexp.weight": "model.layers.{}.mlp.shared_expert.up_proj.weight",
    "blk.{}.ffn_down_shexp.weight": "model.layers.{}.mlp.shared_expert.down_proj.weight",
}

ARCHITECTURE = Architecture(
    model_types=("qwen2_moe",),
    gguf_arch="qwen2moe",
    config=read_config,
    build=mixture.build,
    gguf_names=qwen2.GGUF_NAMES | mixture.GGUF_NAMES | GGUF_NAMES,
    lora_targets=mixture.LORA_TARGETS,
    dialect="qwen_fn",
)
