"""Adapters made in code, in PEFT's layout, for tiny models made in code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwenkit.checkpoint import write_safetensors
from qwenkit.layers.linear import Linear

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIRST = ["c_attn", "c_proj", "w1", "w2"]  # of Qwen's first generation


def adapter_tensors(
    model: nn.Module, targets: list[str], rank: int, *, seed: int = 0, std: float = 0.2
) -> dict[str, torch.Tensor]:
    """Random matrices for every linear layer whose path ends in one of `targets`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, module in model.named_modules():
        if type(module) is Linear and path.rpartition(".")[2] in targets:
            down = torch.randn(rank, module.in_features, generator=generator) * std
            up = torch.randn(module.out_features, rank, generator=generator) * std
            tensors[f"base_model.model.{path}.lora_A.weight"] = down
            tensors[f"base_model.model.{path}.lora_B.weight"] = up
    return tensors


def write_made_adapter(
    folder: Path,
    model: nn.Module,
    *,
    targets: list[str] = PROJECTIONS,
    rank: int = 4,
    seed: int = 0,
    tensors: dict[str, torch.Tensor] | None = None,
    **config: Any,
) -> Path:
    """Write the folder; `config` replaces keys of adapter_config.json. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        tensors = adapter_tensors(model, targets, rank, seed=seed)
    given = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(given | config))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder
