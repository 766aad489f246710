"""Checkpoints that nothing is wrong with, and config.json files as they are published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from planting import CONFIG_FILE, GENERATION, HEAD, SETTINGS, YARN, edit

from qwenkit.models.published import published_tensors
from qwenkit.models.spec import find
from tiny import CONFIG, tiny_tensors, write_tiny_checkpoint

# What published config.json files hold beyond the shapes, by model.
_SHAPES = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
_LATER: dict[str, Any] = {
    **_SHAPES,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_MIXTURE: dict[str, Any] = {
    **_LATER,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen-7B-Chat": {
        **_SHAPES,
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
        "attn_dropout_prob": 0.0,
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "initializer_range": 0.02,
        "intermediate_size": 22016,
        "kv_channels": 128,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 32768,
        "model_type": "qwen",
        "no_bias": True,
        "onnx_safe": None,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 8192,
        "softmax_in_fp32": False,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "use_cache": True,
        "use_cache_kernel": False,
        "use_cache_quantization": False,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "vocab_size": 151936,
    },
    "Qwen1.5-7B-Chat": _LATER | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "Qwen2-72B": _LATER
    | {"model_type": "qwen2", "hidden_size": 8192, "rms_norm_eps": 1e-5, "num_attention_heads": 64},
    "QwQ-32B": _LATER
    | {"model_type": "qwen2", "hidden_size": 5120, "rms_norm_eps": 1e-5}
    | {"num_attention_heads": 40, "num_key_value_heads": 8, "num_hidden_layers": 64}
    | {"intermediate_size": 27648},
    "Qwen1.5-MoE-A2.7B": _MIXTURE
    | {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "shared_expert_intermediate_size": 5632,
    },
    "Qwen3-8B": _LATER
    | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "rope_scaling": None,
        "sliding_window": None,
    },
    "Qwen3-30B-A3B": _MIXTURE
    | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": []},
    "SmolLM2-135M-Instruct": _SHAPES
    | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "vocab_size": 49152,
    },
}


def _tied(folder: Path) -> Path:
    held = tiny_tensors(CONFIG)
    del held[HEAD]
    return write_tiny_checkpoint(folder, config={"tie_word_embeddings": True}, tensors=held)


def published(folder: Path) -> Path:
    """With everything odd that published checkpoints have."""
    held = {name: tensor.bfloat16() for name, tensor in tiny_tensors(CONFIG).items()}
    write_tiny_checkpoint(folder, tensors=held, shard_bytes=20_000)
    values: dict[str, Any] = {
        "use_sliding_window": False,
        "sliding_window": 512,
        "max_window_layers": 2,
    }
    values |= {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
    values |= {"torch_dtype": "bfloat16", "bos_token_id": 256, "transformers_version": "4.40.1"}
    edit(folder, CONFIG_FILE, **values, rope_scaling=YARN, architectures=["Qwen2ForCausalLM"])
    edit(folder, GENERATION, do_sample=True, top_k=20, repetition_penalty=1.05, pad_token_id=256)
    edit(folder, SETTINGS, eos_token="<|im_end|>", bos_token=None, errors="replace")
    (folder / "LICENSE").write_text("")
    return folder


def _base(folder: Path) -> Path:
    """A base model: it ends at the end of text, though it has a template."""
    write_tiny_checkpoint(folder, config={"eos_token_id": 256}, generation={"eos_token_id": 256})
    edit(folder, SETTINGS, eos_token="<|endoftext|>")
    return folder


def _of(model_type: str, **values: Any) -> Callable[[Path], Path]:
    """A checkpoint of another architecture."""

    def build(folder: Path) -> Path:
        wanted = CONFIG | {"num_key_value_heads": None} | values | {"model_type": model_type}
        wanted = {key: value for key, value in wanted.items() if value is not None}
        architecture = find(model_type)
        published = published_tensors(architecture.build(architecture.config(wanted)))
        generator = torch.Generator().manual_seed(0)
        held = {named.name: torch.randn(named.shape, generator=generator) for named in published}
        write_tiny_checkpoint(folder, tensors=held)
        (folder / CONFIG_FILE).write_text(json.dumps(wanted))
        return folder

    return build


_FIRST = {"layer_norm_epsilon": 1e-6, "seq_length": 512, "use_logn_attn": True}


def _first_generation(folder: Path) -> Path:
    _of("qwen", **_FIRST)(folder)
    edit(folder, CONFIG_FILE, "rms_norm_eps", "rope_theta", eos_token_id=256)
    edit(folder, SETTINGS, "chat_template", "pad_token")
    edit(folder, GENERATION, chat_format="chatml", eos_token_id=256, top_k=0, max_window_size=512)
    return folder


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CLEAN: dict[str, Callable[[Path], Path]] = {
    "qwen": _first_generation,
    "qwen2_moe": _of("qwen2_moe", **_EXPERTS, shared_expert_intermediate_size=24),
    "qwen3": _of("qwen3", head_dim=16, num_key_value_heads=2),
    "qwen3_moe": _of("qwen3_moe", **_EXPERTS, head_dim=16, norm_topk_prob=True),
    "baichuan": _of(
        "baichuan", model_max_length=512, max_position_embeddings=None, z_loss_weight=0
    ),
    "chat": lambda folder: write_tiny_checkpoint(folder),
    "parts": lambda folder: write_tiny_checkpoint(folder, shard_bytes=20_000),
    "llama": _of("llama", rms_norm_eps=1e-5, num_key_value_heads=2),
    "tied": _tied,
    "published": published,
    "base": _base,
}
