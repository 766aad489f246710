"""Tiny models and conversations to quantize, made in code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qwenkit.bench.random_model import write_random_folder
from qwenkit.quantize.calibrate import Rows, read_rows
from qwenkit.quantize.compare import Comparison, compare
from qwenkit.quantize.run import quantize
from qwenkit.quantize.settings import QuantizeSettings
from qwenkit.quantize.stream import LayerSource
from qwenkit.quantize.work import WorkFolder
from tiny import write_tiny_checkpoint

DENSE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}
EXPERTS: dict[str, Any] = {
    "hidden_size": 64,
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}


def write_conversations(file: Path, count: int = 24) -> Path:
    """Conversations in Qwen1.5's layout, one a line."""
    lines = []
    for number in range(count):
        answer = f"It is {number * 7} and so on. " * (number % 3 + 1)
        messages = [
            {"role": "user", "content": f"What is seven times {number}?"},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"type": "chatml", "messages": messages}))
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def made_rows(source: LayerSource, folder: Path) -> Rows:
    """Rows of such conversations."""
    file = write_conversations(folder / "chats.jsonl")
    return read_rows([file], [], source.tokenizer, source.record, most_rows=24, most_tokens=None)


def write_quantized(
    folder: Path, settings: QuantizeSettings, *, config: dict[str, Any] | None = None
) -> tuple[LayerSource, Path, Rows]:
    """A tiny parent in `folder`/parent and what became of it in `folder`/result."""
    path = write_tiny_checkpoint(folder / "parent", config=DENSE if config is None else config)
    source = LayerSource(path)
    rows = made_rows(source, folder)
    with torch.inference_mode():
        work, _ = quantize(source, rows, settings, folder / "result")
    publish_unjudged(work)
    return source, folder / "result", rows


def write_quantized_random(folder: Path, settings: QuantizeSettings, shape: dict[str, Any]) -> Path:
    """What became of random weights of a shape that other programs can read: `folder`/result, the
    parent being `folder`/parent.
    """
    write_random_folder(folder / "parent", shape)
    source = LayerSource(folder / "parent")
    book = folder / "book.txt"
    book.write_text("some words and then some more of them " * 60, encoding="utf-8")
    rows = read_rows([book], [], source.tokenizer, source.record, most_rows=16, most_tokens=64)
    with torch.inference_mode():
        work, _ = quantize(source, rows, settings, folder / "result")
    publish_unjudged(work)
    return folder / "result"


def publish_unjudged(work: WorkFolder) -> None:
    """Without a look at what it is worth: random weights suffer much."""
    work.publish()


def compared(parent: LayerSource, path: Path, rows: Rows) -> Comparison:
    """A result beside its parent, on the rows that were kept back."""
    with torch.inference_mode():
        return compare(parent, LayerSource(path), rows.judging, is_text=True)
