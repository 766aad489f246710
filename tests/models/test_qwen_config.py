"""Configurations of the first generation: both layouts, what a missing key means, refusals."""

from __future__ import annotations

from typing import Any

import pytest

from qwenkit.errors import ConfigError
from qwenkit.layers.position import QwenNtk, Rotary
from qwenkit.models import qwen
from qwenkit.models.catalogue import PUBLISHED

AUGUST = PUBLISHED["Qwen/Qwen-7B of August 2023"].config
SEPTEMBER = PUBLISHED["Qwen/Qwen-7B"].config


def test_both_layouts_give_one_shape() -> None:
    old, new = qwen.read_config(AUGUST), qwen.read_config(SEPTEMBER)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        assert getattr(old, name) == getattr(new, name)
    assert (old.num_attention_heads, old.num_key_value_heads, old.head_dim) == (32, 32, 128)
    assert (old.max_position_embeddings, new.max_position_embeddings) == (6144, 8192)


def test_which_of_the_two_7b_files_it_is() -> None:
    extended = Rotary(128, 10000.0, QwenNtk(trained_tokens=8192), 8192)
    assert qwen.read_config(SEPTEMBER).position == extended
    assert qwen.read_config(AUGUST).position == Rotary(128, 10000.0)
    chat = {**AUGUST, "use_dynamic_ntk": True, "use_logn_attn": True}
    assert qwen.read_config(chat).position == Rotary(
        128, 10000.0, QwenNtk(trained_tokens=2048), 2048
    )


def test_what_a_missing_key_means_differs_by_layout() -> None:
    keys = ("use_dynamic_ntk", "use_logn_attn", "layer_norm_epsilon")
    new = qwen.read_config({k: v for k, v in SEPTEMBER.items() if k not in keys})
    old = qwen.read_config({k: v for k, v in AUGUST.items() if k not in keys})
    assert new == qwen.read_config(SEPTEMBER)
    assert (new.layer_norm_epsilon, old.layer_norm_epsilon) == (1e-6, 1e-5)
    assert old.position == Rotary(128, 10000.0)


@pytest.mark.parametrize("name", ["Qwen/Qwen-14B", "Qwen/Qwen-72B", "Qwen/Qwen-1_8B"])
def test_positions_of_the_other_sizes(name: str) -> None:
    expected = {
        "Qwen/Qwen-14B": Rotary(128, 10000.0, QwenNtk(trained_tokens=2048), 2048),
        "Qwen/Qwen-72B": Rotary(128, 1e6),
        "Qwen/Qwen-1_8B": Rotary(128, 10000.0, QwenNtk(trained_tokens=8192), 8192),
    }
    assert qwen.read_config(PUBLISHED[name].config).position == expected[name]


def test_keys_of_how_to_compute_change_nothing() -> None:
    how = {"use_flash_attn": False, "use_cache_quantization": True, "softmax_in_fp32": True}
    assert qwen.read_config({**SEPTEMBER, **how, "fp32": True}) == qwen.read_config(SEPTEMBER)


@pytest.mark.parametrize(
    ("config", "change", "key"),
    [
        (SEPTEMBER, {"hidden_size": None}, "hidden_size"),
        (AUGUST, {"n_embd": -1}, "n_embd"),
        (AUGUST, {"n_head": 31, "kv_channels": None}, "n_head"),
        (SEPTEMBER, {"kv_channels": 127}, "kv_channels"),
        (SEPTEMBER, {"intermediate_size": 22017}, "intermediate_size"),
        (AUGUST, {"ffn_hidden_size": None}, "intermediate_size"),
        (SEPTEMBER, {"bf16": True, "fp16": True}, "fp16"),
        (SEPTEMBER, {"rotary_pct": 0.5}, "rotary_pct"),
        (SEPTEMBER, {"scale_attn_weights": False}, "scale_attn_weights"),
        (AUGUST, {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
        (AUGUST, {"pos_emb": "learned"}, "pos_emb"),
        (SEPTEMBER, {"seq_length": 0}, "seq_length"),
        (SEPTEMBER, {"use_dynamic_ntk": 1}, "use_dynamic_ntk"),
        (SEPTEMBER, {"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(
    config: dict[str, Any], change: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{key}"):
        qwen.read_config({**config, **change})
