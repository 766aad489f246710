"""The shapes that random weights are made of, from the models' published config.json files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwenkit.errors import UsageError, suggest


def _shape(
    model_type: str,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    vocab: int,
    *,
    tied: bool = False,
    rope_theta: float = 1e6,
    context: int = 32768,
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rope_theta": rope_theta,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": context,
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen1.5-0.5b": _shape("qwen2", 1024, 24, 16, 16, 2816, 151936, tied=True),
    "qwen1.5-1.8b": _shape("qwen2", 2048, 24, 16, 16, 5504, 151936),
    "qwen1.5-4b": _shape("qwen2", 2560, 40, 20, 20, 6912, 151936, rope_theta=5e6),
    "qwen1.5-7b": _shape("qwen2", 4096, 32, 32, 32, 11008, 151936),
    "qwen2-0.5b": _shape("qwen2", 896, 24, 14, 2, 4864, 151936, tied=True),
    "qwen2-1.5b": _shape("qwen2", 1536, 28, 12, 2, 8960, 151936, tied=True),
    "qwen2-7b": _shape("qwen2", 3584, 28, 28, 4, 18944, 152064),
    "smollm2-135m": _shape(
        "llama", 576, 30, 9, 3, 1536, 49152, tied=True, rope_theta=1e5, context=8192
    ),
}


def shape(name: str) -> dict[str, Any]:
    """The config.json dictionary of a published shape. Raises UsageError naming the nearest."""
    if name not in SHAPES:
        raise UsageError(f"shape: got {name!r}. {suggest(name, SHAPES)}")
    return dict(SHAPES[name])
