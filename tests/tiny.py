"""A tiny ChatML checkpoint made in code: random Qwen2, the 256 bytes as vocabulary."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch

from qwenkit.checkpoint import write_safetensors
from qwenkit.models.published import published_tensors
from qwenkit.models.spec import find

ENDOFTEXT, IM_START, IM_END = 256, 257, 258  # after the bytes, in the first generation's order
CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 480,  # 464 ids in use: 256 bytes and 208 control tokens
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": IM_END,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under their published names."""
    architecture = find(config["model_type"])
    model = architecture.build(architecture.config(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in ((t.name, t.tensor) for t in published_tensors(model)):
        noise = torch.randn(tensor.shape, generator=generator) * 0.3
        tensors[name] = 1 + noise if "norm" in name else noise
    return tensors


def write_tiny_checkpoint(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    template: str | None = TEMPLATE,
    tensors: dict[str, torch.Tensor] | None = None,
    shard_bytes: int = 1 << 30,
) -> Path:
    """Write the checkpoint folder; what is given replaces parts of it. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    full = CONFIG | (config or {})
    (folder / "config.json").write_text(json.dumps(full))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [IM_END, ENDOFTEXT]} if generation is None else generation)
    )
    lines = (f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256))
    (folder / "qwen.tiktoken").write_text("".join(lines))
    tokenizer_config = {"tokenizer_class": "QWenTokenizer", "pad_token": "<|endoftext|>"}
    if template is not None:
        tokenizer_config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    tensors = tiny_tensors(full) if tensors is None else tensors
    write_safetensors(folder / "model.safetensors", tensors, shard_bytes=shard_bytes)
    return folder
