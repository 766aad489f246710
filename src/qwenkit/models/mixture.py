"""What the architectures with a mixture of experts share: their keys in `config.json`, and which
layers have experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qwenkit.errors import ConfigError
from qwenkit.layers.moe import SparseMoe
from qwenkit.models import qwen2
from qwenkit.models.config_keys import flag, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(qwen2.Config):
    """The dense skeleton's shapes and the experts'.

    `shared_expert_intermediate_size` is 0 where there is no shared expert. Every
    `decoder_sparse_step`-th layer has experts, except those of `mlp_only_layers`.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]


def read_config(config: Mapping[str, Any], *, shared_expert: bool) -> Config:
    """From a `config.json` dictionary; with `shared_expert` the size of one is required. Raises
    ConfigError naming the key.

    Some tools write `num_local_experts` for `num_experts`.
    """
    dense = qwen2.read_config(config)
    local = config.get("num_experts") is None and "num_local_experts" in config
    experts = whole(config, "num_local_experts" if local else "num_experts")
    chosen = whole(config, "num_experts_per_tok")
    if chosen > experts:
        raise ConfigError(f"num_experts_per_tok: got {chosen}, but there are {experts} experts.")
    size = whole(config, "moe_intermediate_size")
    if experts * size >= 2**31:
        raise ConfigError(f"num_experts: {experts} of {size} rows are more than a matrix can have.")
    shared = whole(config, "shared_expert_intermediate_size") if shared_expert else 0
    fields = {f.name: getattr(dense, f.name) for f in dataclasses.fields(dense)}
    return Config(
        **fields,
        num_experts=experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=size,
        shared_expert_intermediate_size=shared,
        norm_topk_prob=flag(config, "norm_topk_prob", False),
        decoder_sparse_step=whole(config, "decoder_sparse_step", 1),
        mlp_only_layers=_layers(config, "mlp_only_layers", dense.num_hidden_layers),
    )


def _layers(config: Mapping[str, Any], key: str, count: int) -> tuple[int, ...]:
    """Numbers of layers. Raises ConfigError for anything else."""
    value = config.get(key) or []
    numbers = value if isinstance(value, list | tuple) else (None,)
    if any(type(number) is not int or not 0 <= number < count for number in numbers):
        raise ConfigError(
            f"{key}: expected a list of layers, each from 0 up to {count - 1}, got {value!r}."
        )
    return tuple(numbers)


def build(config: Config) -> qwen2.Model:
    """The dense skeleton with experts in the layers that have them."""
    return qwen2.Model(config, lambda layer: _mlp(config, layer))


def _mlp(config: Config, layer: int) -> nn.Module:
    if layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step:
        return qwen2.dense_mlp(config)
    return SparseMoe(
        config.hidden_size,
        num_experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        normalise=config.norm_topk_prob,
        shared_intermediate_size=config.shared_expert_intermediate_size,
    )


GGUF_NAMES = {
    "blk.{}.ffn_gate_inp.weight": "model.layers.{}.mlp.gate.weight",
    "blk.{}.ffn_gate_exps.weight": "model.layers.{}.mlp.experts.gate_proj.weight",
    "blk.{}.ffn_up_exps.weight": "model.layers.{}.mlp.experts.up_proj.weight",
    "blk.{}.ffn_down_exps.weight": "model.layers.{}.mlp.experts.down_proj.weight",
}

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
