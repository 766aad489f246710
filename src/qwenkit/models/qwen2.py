"""Qwen1.5, Qwen2 and Qwen2.5 dense models (arXiv 2407.10671).

A pre-norm decoder: RMSNorm, rotary attention with grouped keys and values and biases on q, k and v,
SwiGLU. Llama is the same skeleton with other biases, Qwen3 with normalised queries and keys; in the
mixtures some layers have experts in place of the SwiGLU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from qwenkit.errors import ConfigError
from qwenkit.layers.attention import AttentionContext
from qwenkit.layers.linear import Embedding, Linear, expected_sizes, project
from qwenkit.layers.mlp import SwiGLU
from qwenkit.layers.norm import RMSNorm
from qwenkit.layers.position import DualChunk, Rotary
from qwenkit.models.config_keys import flag, layer_count, only, positive, whole
from qwenkit.models.config_rope import rotary_position
from qwenkit.models.config_window import Windows, from_layer, layer_windows
from qwenkit.models.spec import Architecture, CausalModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Shapes and constants; the names are those of `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    position: Rotary | DualChunk
    windows: Windows
    tie_word_embeddings: bool
    qkv_bias: bool = True
    output_bias: bool = False
    qk_norm: bool = False


def read_config(config: Mapping[str, Any]) -> Config:
    """From a `config.json` dictionary. Raises ConfigError naming the key."""
    heads = whole(config, "num_attention_heads")
    kv_heads = whole(config, "num_key_value_heads", heads)
    hidden_size = whole(config, "hidden_size")
    if heads % kv_heads:
        raise ConfigError(f"num_key_value_heads: {kv_heads} does not divide {heads} heads.")
    if config.get("head_dim") is None and hidden_size % heads:
        raise ConfigError(
            f"num_attention_heads: {heads} does not divide hidden_size {hidden_size}."
        )
    head_dim = whole(config, "head_dim", hidden_size // heads)
    if head_dim % 2:
        raise ConfigError(f"head_dim: rotary embedding needs an even number, got {head_dim}.")
    longest = whole(config, "max_position_embeddings", 32768)
    only(config, "hidden_act", "silu")
    layers = layer_count(config)
    return Config(
        vocab_size=whole(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=whole(config, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=longest,
        rms_norm_eps=positive(config, "rms_norm_eps", 1e-6),
        position=rotary_position(
            config, head_dim=head_dim, max_position_embeddings=longest, base=10000.0
        ),
        windows=layer_windows(config, layers, slides=from_layer),
        tie_word_embeddings=flag(config, "tie_word_embeddings", False),
    )


class Attention(nn.Module):
    """Grouped-query attention; where earlier keys and values are is the context's business."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.position = config.position
        self.window = config.windows[layer]
        hidden_size, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        self.q_proj = Linear(hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = Linear(hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(q_size, hidden_size, bias=config.output_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        context: AttentionContext,
        residual: torch.Tensor,
        norm: RMSNorm,
    ) -> torch.Tensor:
        """x [tokens, hidden_size], normalised by `norm`, to the same shape; `residual`, of that
        shape, is added.
        """
        projections = project(x, (self.q_proj, self.k_proj, self.v_proj), norm)
        # [tokens, heads, head_dim] and twice [tokens, kv_heads, head_dim]
        q, k, v = (y.view(len(y), -1, self.head_dim) for y in projections)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)  # each head by itself
        output = context.attend(
            self.layer, q, k, v, self.position, window=self.window
        )  # [tokens, heads, head_dim]
        y: torch.Tensor = self.o_proj(output.flatten(-2), residual)
        return y

    def key_sizes(self, norm: RMSNorm) -> torch.Tensor:
        """Root mean squares of keys that are to be expected after `norm`: [kv_heads, head_dim]."""
        sizes = expected_sizes(self.k_proj, norm).view(-1, self.head_dim)
        if self.k_norm is None:
            return sizes
        return self.k_norm.weight.detach().abs().expand_as(sizes)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config, layer: int, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """x [tokens, hidden_size] to the same shape."""
        x = self.self_attn(x, context, residual=x, norm=self.input_layernorm)
        x = self.mlp(x, residual=x, norm=self.post_attention_layernorm)
        return x


def dense_mlp(config: Config) -> SwiGLU:
    """The feed-forward part of a layer without experts."""
    return SwiGLU(config.hidden_size, config.intermediate_size)


class Decoder(nn.Module):
    """Everything below the head."""

    def __init__(self, config: Config, mlp: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, mlp(i)) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, ids: torch.Tensor, context: AttentionContext, dtype: torch.dtype
    ) -> torch.Tensor:
        """ids [tokens] to the normalised hidden states [rows, hidden_size] that are wanted."""
        x = self.embed_tokens(ids, dtype)  # [tokens, hidden_size]
        for layer in self.layers:
            x = layer(x, context)
        hidden: torch.Tensor = self.norm(context.select(x))
        return hidden


class Model(CausalModel):
    """The decoder and its head; a tied head is the embedding's own weight.

    `mlp` makes the feed-forward part of each layer, given its number; a `SwiGLU` by default.
    """

    def __init__(self, config: Config, mlp: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.get_default_dtype()
        self.model = Decoder(config, mlp or (lambda layer: dense_mlp(config)))
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, ids: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """See `CausalModel.hidden`."""
        hidden: torch.Tensor = self.model(ids, context, self.dtype)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `CausalModel.logits`."""
        logits: torch.Tensor = self.lm_head(hidden)
        return logits

    def key_sizes(self) -> list[torch.Tensor]:
        """See `CausalModel.key_sizes`."""
        layers = cast(list[DecoderLayer], list(self.model.layers))
        return [layer.self_attn.key_sizes(layer.input_layernorm) for layer in layers]


GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_q.bias": "model.layers.{}.self_attn.q_proj.bias",
    "blk.{}.attn_k.bias": "model.layers.{}.self_attn.k_proj.bias",
    "blk.{}.attn_v.bias": "model.layers.{}.self_attn.v_proj.bias",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.attn_output.bias": "model.layers.{}.self_attn.o_proj.bias",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
}

GGUF_QK_NORM = {
    "blk.{}.attn_q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blk.{}.attn_k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
}

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

ARCHITECTURE = Architecture(
    model_types=("qwen2",),
    gguf_arch="qwen2",
    config=read_config,
    build=Model,
    gguf_names=GGUF_NAMES,
    lora_targets=LORA_TARGETS,
    dialect="qwen_fn",
)
