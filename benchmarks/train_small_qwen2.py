"""Trains a small Qwen2 on a text: a parent whose quantization can be measured.

    python benchmarks/train_small_qwen2.py OUT TEXT [TEXT ...] [--steps 300] [--threads 2]

TEXT is plain text, or JSON lines with "text". The vocabulary is the 256 bytes in the first
generation's order, with its control tokens; 2.9 million parameters. The same arguments give the
same weights on the same machine.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import time
from pathlib import Path

import torch
from torch.nn import functional

from qwenkit.checkpoint import write_safetensors
from qwenkit.layers.attention import PackedCausal
from qwenkit.models.published import published_tensors
from qwenkit.models.spec import CausalModel, find

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 256,
}
ROWS, ROW_TOKENS = 12, 256
PEAK_RATE, WARM_UP_STEPS = 2e-3, 30


def read_bytes(files: list[Path]) -> torch.Tensor:
    """All texts, one after another, as ids of bytes."""
    parts = []
    for file in files:
        content = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            content = "\n".join(json.loads(line)["text"] for line in content.splitlines() if line)
        parts.append(content)
    return torch.tensor(list("\n".join(parts).encode()), dtype=torch.int64)


def build() -> CausalModel:
    """The model with its first weights."""
    architecture = find("qwen2")
    model = architecture.build(architecture.config(CONFIG))
    model.dtype = torch.float32
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.constant_(parameter, 1.0 if "norm" in name else 0.0)
        else:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def train(model: CausalModel, text: torch.Tensor, steps: int) -> None:
    """AdamW on random rows of the text, the rate along a half cosine."""
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    context = PackedCausal([ROW_TOKENS] * ROWS, training=True)
    began = time.perf_counter()
    for step in range(steps):
        share = step / steps
        rate = (
            PEAK_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (1 + math.cos(math.pi * share)) / 2
        )
        for group in optimiser.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, len(text) - ROW_TOKENS - 1, (ROWS,))
        rows = torch.stack([text[s : s + ROW_TOKENS + 1] for s in starts.tolist()])
        logits = model(rows[:, :-1].flatten(), context)  # [rows * tokens, vocab_size]
        loss = functional.cross_entropy(logits, rows[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 25 == 24 or step + 1 == steps:
            seconds = time.perf_counter() - began
            print(f"step {step + 1}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)  # noqa: T201


def write(model: CausalModel, folder: Path) -> None:
    """A model folder in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {t.name: t.tensor.to(torch.bfloat16) for t in published_tensors(model)}
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2), encoding="utf-8")
    lines = (f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256))
    (folder / "qwen.tiktoken").write_text("".join(lines), encoding="utf-8")
    settings = {"tokenizer_class": "QWenTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def main() -> None:
    """Read the arguments, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = build()
    train(model, read_bytes(given.texts), given.steps)
    write(model.requires_grad_(False), given.out)


if __name__ == "__main__":
    main()
