"""A tiny checkpoint of Qwen's first generation made in code, as its files were published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qwenkit.models import qwen
from tiny import ENDOFTEXT, IM_END, write_tiny_checkpoint

FIRST: dict[str, Any] = {
    "model_type": "qwen",
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "max_position_embeddings": 256,
    "seq_length": 64,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "tie_word_embeddings": False,
    "vocab_size": 480,
}
GENERATION: dict[str, Any] = {
    "chat_format": "chatml",
    "eos_token_id": ENDOFTEXT,
    "pad_token_id": ENDOFTEXT,
    "max_window_size": 200,
    "max_new_tokens": 64,
    "do_sample": True,
    "top_k": 0,
    "top_p": 0.8,
}


def write_first_generation(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write the folder; `config` replaces keys. Without eos in config.json, as published."""
    full = FIRST | (config or {})
    if tensors is None:
        tensors = first_tensors(full)
    write_tiny_checkpoint(
        folder, generation=generation or GENERATION, template=None, tensors=tensors
    )
    (folder / "config.json").write_text(json.dumps(full))
    return folder


def first_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under their published names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in qwen.Model(qwen.read_config(config)).named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.3
        tensors[name] = 1 + noise if "ln_" in name else noise
    return tensors


__all__ = ["ENDOFTEXT", "FIRST", "GENERATION", "IM_END", "first_tensors", "write_first_generation"]
