"""Baichuan2-13B (arXiv 2309.10305), which the first Qwen's code was compared with.

A pre-norm decoder with one matrix for queries, keys and values, ALiBi (arXiv 2108.12409) in place
of a position embedding, SwiGLU, and a head whose rows are normalised. The 7B of the same
`model_type` is rotary and is refused, as is the first Baichuan, whose head is plain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qwenkit.errors import ConfigError
from qwenkit.layers.attention import AttentionContext
from qwenkit.layers.linear import Embedding, Linear, project
from qwenkit.layers.mlp import SwiGLU
from qwenkit.layers.norm import RMSNorm
from qwenkit.layers.position import ALIBI_BIAS, Alibi
from qwenkit.models import qwen2
from qwenkit.models.config_keys import flag, layer_count, only, positive, whole
from qwenkit.models.spec import Anatomy, Architecture, CausalModel

_SHORTEST_NORM = 1e-12  # a head's row of zeros stays one


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Shapes and constants; the names are those of `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    model_max_length: int
    rms_norm_eps: float
    tie_word_embeddings: bool

    @property
    def num_key_value_heads(self) -> int:
        """Every head has its own keys and values."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Numbers in one head's query."""
        return self.hidden_size // self.num_attention_heads

    @property
    def max_position_embeddings(self) -> int:
        """The trained length, by the name it has in other models."""
        return self.model_max_length

    @property
    def position(self) -> Alibi:
        """The position spec of every layer."""
        return Alibi(alibi_slopes(self.num_attention_heads))


def read_config(config: Mapping[str, Any]) -> Config:
    """From a `config.json` dictionary. Raises ConfigError naming the key."""
    if config.get("max_position_embeddings") is not None:
        raise ConfigError(
            "max_position_embeddings: is a key of Baichuan's rotary models, such as Baichuan2-7B; "
            "only Baichuan2-13B, which has model_max_length, is supported."
        )
    if "z_loss_weight" not in config:
        raise ConfigError(
            "z_loss_weight: is missing, as in the first Baichuan; only Baichuan2-13B, whose head "
            "is normalised, is supported."
        )
    heads, hidden_size = whole(config, "num_attention_heads"), whole(config, "hidden_size")
    if hidden_size % heads:
        raise ConfigError(
            f"num_attention_heads: {heads} does not divide hidden_size {hidden_size}."
        )
    only(config, "hidden_act", "silu")
    only(config, "max_alibi_bias", ALIBI_BIAS)
    return Config(
        vocab_size=whole(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=whole(config, "intermediate_size"),
        num_hidden_layers=layer_count(config),
        num_attention_heads=heads,
        model_max_length=whole(config, "model_max_length", 4096),
        rms_norm_eps=positive(config, "rms_norm_eps", 1e-6),
        tie_word_embeddings=flag(config, "tie_word_embeddings", False),
    )


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """ALiBi's slope of each head.

    For a power of two the powers of 2^(-8 / heads); else those of the next lower power of two and
    then every other one of the next higher.
    """
    lower = 2 ** int(math.log2(heads))
    slopes = [2 ** (-ALIBI_BIAS * n / lower) for n in range(1, lower + 1)]
    between = [2 ** (-ALIBI_BIAS * n / (2 * lower)) for n in range(1, 2 * lower, 2)]
    return tuple(slopes + between[: heads - lower])


class Attention(nn.Module):
    """Attention with one matrix for queries, keys and values, in this order, all of one size."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.position = config.position
        self.W_pack = Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, context: AttentionContext, residual: torch.Tensor, norm: RMSNorm
    ) -> torch.Tensor:
        """x [tokens, hidden_size], normalised by `norm`, to the same shape; `residual`, of that
        shape, is added.
        """
        [packed] = project(x, (self.W_pack,), norm)
        q, k, v = packed.view(len(packed), 3, -1, self.head_dim).unbind(1)
        # each [tokens, heads, head_dim]
        output = context.attend(self.layer, q, k, v, self.position)  # [tokens, heads, head_dim]
        y: torch.Tensor = self.o_proj(output.flatten(-2), residual)
        return y


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """x [tokens, hidden_size] to the same shape."""
        x = self.self_attn(x, context, residual=x, norm=self.input_layernorm)
        x = self.mlp(x, residual=x, norm=self.post_attention_layernorm)
        return x


class Decoder(nn.Module):
    """Everything below the head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
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


class NormalisedHead(Linear):
    """y = x Wᵀ with every row of W divided by its length.

    The lengths are measured once, at the first use of a weight that is not being trained.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self._measured: tuple[object, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in_features] to [..., out_features]; `residual`, of that shape, is added."""
        y: torch.Tensor = super().forward(x) / self._lengths().to(x.dtype)
        return y if residual is None else residual + y

    def _lengths(self) -> torch.Tensor:
        """The length of each row of the weight: fp32 [out_features]."""
        weight = self.weight
        trained = isinstance(weight, nn.Parameter) and weight.requires_grad
        if self._measured is not None and self._measured[0] is weight and not trained:
            return self._measured[1]
        plain = weight if isinstance(weight, nn.Parameter) else weight.dequantize(torch.float32)
        norms: torch.Tensor = torch.linalg.vector_norm(plain, dim=1, dtype=torch.float32)
        lengths = norms.clamp_min(_SHORTEST_NORM)  # [out_features]
        if not trained:
            self._measured = (weight, lengths)
        return lengths


class Model(CausalModel):
    """The decoder and its head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.get_default_dtype()
        self.model = Decoder(config)
        self.lm_head = NormalisedHead(config.hidden_size, config.vocab_size)
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


ARCHITECTURE = Architecture(
    model_types=("baichuan",),
    gguf_arch="baichuan",
    config=read_config,
    build=Model,
    gguf_names=qwen2.GGUF_NAMES
    | {"blk.{}.attn_qkv.weight": "model.layers.{}.self_attn.W_pack.weight"},
    gguf_parts={"blk.{}.attn_qkv.weight": tuple(f"blk.{{}}.attn_{part}.weight" for part in "qkv")},
    gguf_interleaved=("attn_q", "attn_k"),  # as for its rotary sister, though nothing turns here
    gguf_unit_rows=("lm_head",),
    ignored=("rotary_emb.inv_freq", "alibi_mask"),
    lora_targets=("W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"),
    anatomy=Anatomy(attention_inputs=("W_pack",)),
)
