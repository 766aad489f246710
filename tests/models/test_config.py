"""Configurations: old and new layouts, published parameter counts, refusals that name the key."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwenkit.errors import ConfigError
from qwenkit.models.catalogue import PUBLISHED
from qwenkit.models.spec import architectures, find

QWEN2_0_5B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 24,
}


def count_parameters(config: dict[str, Any]) -> int:
    architecture = find(config["model_type"])
    with torch.device("meta"):
        model = architecture.build(architecture.config(config))
    return sum(p.numel() for p in model.parameters())


def test_every_file_of_the_folder_is_found_under_its_own_name() -> None:
    assert {"qwen2", "llama"} <= set(architectures())


def test_published_parameter_counts() -> None:
    # Qwen2-0.5B and 1.5B: counted from the published shapes (features V07, V08).
    assert count_parameters(QWEN2_0_5B) == 494_032_768
    larger = QWEN2_0_5B | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    }
    assert count_parameters(larger) == 1_543_714_304


def test_old_and_new_layouts_read_alike() -> None:
    read = find("qwen2").config
    new = {k: v for k, v in QWEN2_0_5B.items() if k != "rope_theta"}
    new |= {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"}
    assert read(new) == read(QWEN2_0_5B | {"torch_dtype": "bfloat16", "rope_scaling": None})


def test_dead_sliding_window_keys_change_nothing() -> None:
    read = find("qwen2").config
    without = {k: v for k, v in QWEN2_0_5B.items() if "window" not in k}
    assert read(without) == read(QWEN2_0_5B)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "896"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),  # else each would take memory
        ({"num_attention_heads": 13}, "num_key_value_heads"),
        ({"num_attention_heads": 10}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 63}, "head_dim"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": "yes"}, "use_sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
        ({"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 24}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 24}, "layer_types"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_scaling": {"type": "yarm", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: "):
        find("qwen2").config(QWEN2_0_5B | change)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"num_experts": None}, "num_experts"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": 2**30}, "num_experts"),
        ({"num_experts_per_tok": 61}, "num_experts_per_tok"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size"),
        ({"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"mlp_only_layers": [24]}, "mlp_only_layers"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers"),
        ({"mlp_only_layers": 3}, "mlp_only_layers"),
        ({"mlp_only_layers": [[1]]}, "mlp_only_layers"),
    ],
)
def test_a_wrong_value_of_a_mixture_is_refused_by_its_key(change: dict[str, Any], key: str) -> None:
    config = {**PUBLISHED["Qwen/Qwen1.5-MoE-A2.7B"].config} | change
    with pytest.raises(ConfigError, match=f"^{key}: "):
        find("qwen2_moe").config(config)


def test_an_unknown_model_type_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="qwen2"):
        find("qwen22")
    with pytest.raises(ConfigError, match=r"Allowed: .*llama"):
        find("resnet")
