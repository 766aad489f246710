"""The shapes of published models, as their config.json files give them, and their parameters.

A tied head is counted once; `active` are the parameters that one token passes through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Published:
    """One model's config.json keys that shape it, and what its weights come to."""

    config: Mapping[str, Any]
    parameters: int
    active: int | None = None


def _shape(
    model_type: str, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 21,
    }


def _experts(number: int, chosen: int, size: int, *, shared: int = 0) -> dict[str, Any]:
    own = {"shared_expert_intermediate_size": shared} if shared else {}
    return own | {
        "num_experts": number,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": not shared,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def _qwen3(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, *, tied: bool = False
) -> dict[str, Any]:
    own = {"head_dim": 128, "attention_bias": False, "tie_word_embeddings": tied}
    return _shape("qwen3", hidden, layers, heads, kv_heads, ffn, 151936) | own


def _qwen3_moe(hidden: int, layers: int, heads: int, ffn: int, size: int) -> dict[str, Any]:
    whole = _qwen3(hidden, layers, heads, 4, ffn) | _experts(128, 8, size)
    return whole | {"model_type": "qwen3_moe"}


PUBLISHED: Mapping[str, Published] = {
    "Qwen/Qwen1.5-MoE-A2.7B": Published(
        _shape("qwen2_moe", 2048, 24, 16, 16, 5632, 151936) | _experts(60, 4, 1408, shared=5632),
        14_315_784_192,
        active=2_689_173_504,
    ),
    "Qwen/Qwen2-57B-A14B": Published(
        _shape("qwen2_moe", 3584, 28, 28, 4, 18944, 151936) | _experts(64, 8, 2560, shared=20480),
        57_408_658_944,
        active=14_249_270_784,
    ),
    "Qwen/Qwen3-0.6B": Published(_qwen3(1024, 28, 16, 8, 3072, tied=True), 596_049_920),
    "Qwen/Qwen3-1.7B": Published(_qwen3(2048, 28, 16, 8, 6144, tied=True), 1_720_574_976),
    "Qwen/Qwen3-4B": Published(_qwen3(2560, 36, 32, 8, 9728, tied=True), 4_022_468_096),
    "Qwen/Qwen3-8B": Published(_qwen3(4096, 36, 32, 8, 12288), 8_190_735_360),
    "Qwen/Qwen3-14B": Published(_qwen3(5120, 40, 40, 8, 17408), 14_768_307_200),
    "Qwen/Qwen3-32B": Published(_qwen3(5120, 64, 64, 8, 25600), 32_762_123_264),
    "Qwen/Qwen3-30B-A3B": Published(
        _qwen3_moe(2048, 48, 32, 6144, 768), 30_532_122_624, active=3_353_032_704
    ),
    "Qwen/Qwen3-235B-A22B": Published(
        _qwen3_moe(4096, 94, 64, 12288, 1536), 235_093_634_560, active=22_190_763_520
    ),
}
