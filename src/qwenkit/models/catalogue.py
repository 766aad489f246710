"""The shapes of published models, as their config.json files give them, and their parameters.

A tied head is counted once; `active` are the parameters that one token passes through. So the sizes
of a published name are known where no hub can be reached.
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
    own |= {"max_position_embeddings": 40960}  # of the base models 32768
    return _shape("qwen3", hidden, layers, heads, kv_heads, ffn, 151936) | own


def _qwen3_moe(hidden: int, layers: int, heads: int, ffn: int, size: int) -> dict[str, Any]:
    whole = _qwen3(hidden, layers, heads, 4, ffn) | _experts(128, 8, size)
    return whole | {"model_type": "qwen3_moe"}


def _dense(
    hidden: int,
    layers: int,
    heads: tuple[int, int],
    ffn: int,
    vocab: int = 152064,
    **other: Any,
) -> dict[str, Any]:
    return _shape("qwen2", hidden, layers, *heads, ffn, vocab) | other


def _long(layers: int) -> dict[str, Any]:
    """What base models for 131,072 tokens have; their instruct models allow 32,768."""
    return {
        "max_position_embeddings": 131072,
        "sliding_window": 131072,
        "max_window_layers": layers,
    }


def _first(hidden: int, layers: int, heads: int, half: int, vocab: int, **other: Any) -> Any:
    """The first generation from 25 September 2023 on; `half` is the width of one SwiGLU half."""
    return {
        "model_type": "qwen",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 2 * half,
        "vocab_size": vocab,
        "kv_channels": 128,
        "seq_length": 8192,
        "max_position_embeddings": 8192,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "no_bias": True,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "use_flash_attn": "auto",
        "bf16": False,
        "fp16": False,
        "fp32": False,
    } | other


_QWEN_7B_AUGUST: Mapping[str, Any] = {
    "model_type": "qwen",
    "activation": "swiglu",
    "apply_residual_connection_post_layernorm": False,
    "bf16": True,
    "ffn_hidden_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "n_embd": 4096,
    "n_head": 32,
    "n_inner": None,
    "n_layer": 32,
    "n_positions": 6144,
    "no_bias": True,
    "padded_vocab_size": 151936,
    "pos_emb": "rotary",
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "use_flash_attn": True,
    "vocab_size": 151851,
}

PUBLISHED: Mapping[str, Published] = {
    "Qwen/Qwen-1_8B": Published(_first(2048, 24, 16, 5504, 151936), 1_836_828_672),
    "Qwen/Qwen-7B of August 2023": Published(_QWEN_7B_AUGUST, 7_721_324_544),
    "Qwen/Qwen-7B": Published(_first(4096, 32, 32, 11008, 151936), 7_721_324_544),
    "Qwen/Qwen-14B": Published(
        _first(5120, 40, 40, 13696, 152064, seq_length=2048), 14_167_290_880
    ),
    "Qwen/Qwen-72B": Published(
        _first(8192, 80, 64, 24576, 152064, rotary_emb_base=1e6)
        | {"use_dynamic_ntk": False, "use_logn_attn": False},
        72_287_920_128,
    ),
    "Qwen/Qwen1.5-0.5B": Published(
        _dense(1024, 24, (16, 16), 2816, 151936, tie_word_embeddings=True), 463_987_712
    ),
    "Qwen/Qwen1.5-1.8B": Published(_dense(2048, 24, (16, 16), 5504, 151936), 1_836_828_672),
    "Qwen/Qwen1.5-4B": Published(
        _dense(2560, 40, (20, 20), 6912, 151936, rope_theta=5e6), 3_950_369_280
    ),
    "Qwen/Qwen1.5-7B": Published(_dense(4096, 32, (32, 32), 11008, 151936), 7_721_324_544),
    "Qwen/Qwen1.5-14B": Published(_dense(5120, 40, (40, 40), 13696), 14_167_290_880),
    "Qwen/Qwen1.5-32B": Published(_dense(5120, 64, (40, 8), 27392), 32_512_218_112),
    "Qwen/Qwen1.5-72B": Published(_dense(8192, 80, (64, 64), 24576), 72_287_920_128),
    "Qwen/Qwen1.5-110B": Published(_dense(8192, 80, (64, 8), 49152), 111_209_914_368),
    "Qwen/Qwen2-0.5B": Published(
        _dense(896, 24, (14, 2), 4864, 151936, tie_word_embeddings=True) | _long(24),
        494_032_768,
    ),
    "Qwen/Qwen2-1.5B": Published(
        _dense(1536, 28, (12, 2), 8960, 151936, tie_word_embeddings=True) | _long(28),
        1_543_714_304,
    ),
    "Qwen/Qwen2-7B": Published(
        _dense(3584, 28, (28, 4), 18944) | _long(28),
        7_615_616_512,
    ),
    "Qwen/Qwen2-72B": Published(
        _dense(8192, 80, (64, 8), 29568, rms_norm_eps=1e-5) | _long(80),
        72_706_203_648,
    ),
    "Qwen/Qwen2-72B-Instruct with YaRN": Published(
        _dense(8192, 80, (64, 8), 29568)
        | {
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            }
        },
        72_706_203_648,
    ),
    "Qwen/Qwen2.5-0.5B": Published(
        _dense(896, 24, (14, 2), 4864, 151936, tie_word_embeddings=True), 494_032_768
    ),
    "Qwen/Qwen2.5-1.5B": Published(
        _dense(1536, 28, (12, 2), 8960, 151936, tie_word_embeddings=True), 1_543_714_304
    ),
    "Qwen/Qwen2.5-3B": Published(
        _dense(2048, 36, (16, 2), 11008, 151936, tie_word_embeddings=True), 3_085_938_688
    ),
    "Qwen/Qwen2.5-7B": Published(_dense(3584, 28, (28, 4), 18944) | _long(28), 7_615_616_512),
    "Qwen/Qwen2.5-14B": Published(
        _dense(5120, 48, (40, 8), 13824, rms_norm_eps=1e-5) | _long(48), 14_770_033_664
    ),
    "Qwen/Qwen2.5-32B": Published(
        _dense(5120, 64, (40, 8), 27648, rms_norm_eps=1e-5) | _long(64), 32_763_876_352
    ),
    "Qwen/Qwen2.5-72B": Published(
        _dense(8192, 80, (64, 8), 29568, rms_norm_eps=1e-5) | _long(80), 72_706_203_648
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": Published(
        _shape("qwen2_moe", 2048, 24, 16, 16, 5632, 151936) | _experts(60, 4, 1408, shared=5632),
        14_315_784_192,
        active=2_689_173_504,
    ),
    "Qwen/Qwen2-57B-A14B": Published(
        _shape("qwen2_moe", 3584, 28, 28, 4, 18944, 151936)
        | _experts(64, 8, 2560, shared=20480)
        | _long(28),
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

_SAME_SHAPE = ("-Instruct", "-Chat", "-Base")  # after a size, in names of models of its shape


def published_config(name: str) -> dict[str, Any] | None:
    """The config.json keys that shape the model of a hub's name; None for a name not listed.

    A chat or instruct model has its base model's shape; instruct models, and the base models of the
    third generation, allow 32,768 tokens.
    """
    base = next((name.removesuffix(end) for end in _SAME_SHAPE if name.endswith(end)), name)
    found = PUBLISHED.get(name) or PUBLISHED.get(base)
    if found is None:
        return None
    is_shorter = name.endswith(("-Instruct", "-Base"))
    shorter = {"max_position_embeddings": 32768} if is_shorter else {}
    return {**found.config, **shorter}
