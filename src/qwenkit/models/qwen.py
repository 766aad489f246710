"""The first generation: Qwen-1.8B, 7B, 14B and 72B (arXiv 2309.16609).

A pre-norm decoder with one matrix for queries, keys and values, rotary attention that goes beyond
its trained length by dynamic NTK and LogN, and SwiGLU whose gate is `w2`. `config.json` came in two
layouts: the names of GPT-2 in August 2023, today's from 25 September on. `intermediate_size` (then
`ffn_hidden_size`) counts both halves of the SwiGLU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from qwenkit.errors import ConfigError
from qwenkit.layers.attention import AttentionContext
from qwenkit.layers.linear import Embedding, Linear, expected_sizes, project
from qwenkit.layers.mlp import gated
from qwenkit.layers.norm import RMSNorm
from qwenkit.layers.position import QwenNtk, Rotary
from qwenkit.models.config_keys import flag, layer_count, only, positive, whole
from qwenkit.models.spec import Anatomy, Architecture, CausalModel

# Other names of the keys: those of August 2023, then those that a GGUF's metadata have.
_OTHER_NAMES = {
    "hidden_size": ("n_embd",),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "max_position_embeddings": ("n_positions",),
    "intermediate_size": ("ffn_hidden_size", "n_inner"),
    "layer_norm_epsilon": ("rms_norm_eps",),
    "rotary_emb_base": ("rope_theta",),
    "kv_channels": ("head_dim",),
}
# What is the same in every published model, and what another value would change.
_ONLY: Mapping[str, object] = {
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "apply_residual_connection_post_layernorm": False,
    "activation": "swiglu",
    "pos_emb": "rotary",
}
_PRECISIONS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Shapes and constants under today's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    max_position_embeddings: int
    layer_norm_epsilon: float
    position: Rotary
    no_bias: bool
    tie_word_embeddings: bool

    @property
    def num_key_value_heads(self) -> int:
        """Every head has its own keys and values."""
        return self.num_attention_heads


def read_config(config: Mapping[str, Any]) -> Config:
    """From a `config.json` dictionary of either layout. Raises ConfigError naming the key.

    The two layouts also differ in what a missing key means: in the older one, no extension beyond
    the trained length. Keys that say how to compute and not what (`use_flash_attn`,
    `use_cache_quantization`, `softmax_in_fp32`, …) change nothing.
    """
    august = any(key in config for key in ("n_embd", "ffn_hidden_size"))
    names = {key: _name(config, key) for key in _OTHER_NAMES}
    for key, value in _ONLY.items():
        only(config, key, value)
    chosen = [key for key in _PRECISIONS if flag(config, key, False)]
    if len(chosen) > 1:
        raise ConfigError(f"{chosen[1]}: only one of {', '.join(_PRECISIONS)} can be true.")
    hidden_size = whole(config, names["hidden_size"])
    heads = whole(config, names["num_attention_heads"])
    if config.get(names["kv_channels"]) is None and hidden_size % heads:
        raise ConfigError(
            f"{names['num_attention_heads']}: {heads} does not divide hidden_size {hidden_size}."
        )
    head_dim = whole(config, names["kv_channels"], hidden_size // heads)
    if head_dim % 2:
        raise ConfigError(
            f"{names['kv_channels']}: rotary embedding needs an even number, got {head_dim}."
        )
    intermediate_size = whole(config, names["intermediate_size"])
    if intermediate_size % 2:
        raise ConfigError(
            f"{names['intermediate_size']}: expected an even number, for it counts two halves, got "
            f"{intermediate_size}."
        )
    longest = whole(config, names["max_position_embeddings"], 8192)
    trained = whole(config, "seq_length", longest)
    dynamic_ntk = flag(config, "use_dynamic_ntk", not august)
    log_n = flag(config, "use_logn_attn", not august)
    rows = "vocab_size" if config.get("padded_vocab_size") is None else "padded_vocab_size"
    return Config(
        vocab_size=whole(config, rows),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layer_count(config, names["num_hidden_layers"]),
        num_attention_heads=heads,
        head_dim=head_dim,
        max_position_embeddings=longest,
        layer_norm_epsilon=positive(config, names["layer_norm_epsilon"], 1e-5 if august else 1e-6),
        position=Rotary(
            head_dim,
            positive(config, names["rotary_emb_base"], 10000.0),
            QwenNtk(trained_tokens=trained) if dynamic_ntk else None,
            trained if log_n else None,
        ),
        no_bias=flag(config, "no_bias", True),
        tie_word_embeddings=flag(config, "tie_word_embeddings", False),
    )


def write_config(config: Config) -> dict[str, Any]:
    """The inverse of `read_config`, in today's layout."""
    scaling, log_n = config.position.scaling, config.position.log_n
    trained = scaling.trained_tokens if isinstance(scaling, QwenNtk) else log_n
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "kv_channels": config.head_dim,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "max_position_embeddings": config.max_position_embeddings,
        "no_bias": config.no_bias,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "rotary_emb_base": config.position.base,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": trained or config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_dynamic_ntk": scaling is not None,
        "use_logn_attn": log_n is not None,
        "vocab_size": config.vocab_size,
    }


def _name(config: Mapping[str, Any], key: str) -> str:
    """The name under which a config has `key`; `key` itself when it has it under none."""
    candidates = (key, *_OTHER_NAMES[key])
    return next((name for name in candidates if config.get(name) is not None), key)


class Attention(nn.Module):
    """Attention with one matrix for queries, keys and values, in this order, all of one size."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.position = config.position
        size = config.num_attention_heads * config.head_dim
        self.c_attn = Linear(config.hidden_size, 3 * size, bias=True)
        self.c_proj = Linear(size, config.hidden_size, bias=not config.no_bias)

    def forward(
        self, x: torch.Tensor, context: AttentionContext, residual: torch.Tensor, norm: RMSNorm
    ) -> torch.Tensor:
        """x [tokens, hidden_size], normalised by `norm`, to the same shape; `residual`, of that
        shape, is added.
        """
        [packed] = project(x, (self.c_attn,), norm)
        q, k, v = packed.view(len(packed), 3, -1, self.head_dim).unbind(1)
        # each [tokens, heads, head_dim]
        output = context.attend(self.layer, q, k, v, self.position)  # [tokens, heads, head_dim]
        y: torch.Tensor = self.c_proj(output.flatten(-2), residual)
        return y

    def key_sizes(self, norm: RMSNorm) -> torch.Tensor:
        """Root mean squares of keys that are to be expected after `norm`: [heads, head_dim]."""
        size = self.c_attn.out_features // 3
        sizes = expected_sizes(self.c_attn, norm, slice(size, 2 * size))
        return sizes.view(-1, self.head_dim)


class MLP(nn.Module):
    """c_proj(silu(w2(x)) · w1(x)): the gate is w2, where later models call it `gate_proj`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        half, bias = config.intermediate_size // 2, not config.no_bias
        self.w1 = Linear(config.hidden_size, half, bias=bias)
        self.w2 = Linear(config.hidden_size, half, bias=bias)
        self.c_proj = Linear(half, config.hidden_size, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        norm: RMSNorm | None = None,
    ) -> torch.Tensor:
        """x [tokens, hidden_size], normalised by `norm`, to the same shape; `residual`, of that
        shape, is added.
        """
        hidden = gated(x, self.w2, self.w1, norm)  # [tokens, intermediate_size / 2]
        y: torch.Tensor = self.c_proj(hidden, residual)
        return y


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """x [tokens, hidden_size] to the same shape."""
        x = self.attn(x, context, residual=x, norm=self.ln_1)
        x = self.mlp(x, residual=x, norm=self.ln_2)
        return x


class Transformer(nn.Module):
    """Everything below the head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(
        self, ids: torch.Tensor, context: AttentionContext, dtype: torch.dtype
    ) -> torch.Tensor:
        """ids [tokens] to the normalised hidden states [rows, hidden_size] that are wanted."""
        x = self.wte(ids, dtype)  # [tokens, hidden_size]
        for block in self.h:
            x = block(x, context)
        hidden: torch.Tensor = self.ln_f(context.select(x))
        return hidden


class Model(CausalModel):
    """The decoder and its head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.get_default_dtype()
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def hidden(self, ids: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """See `CausalModel.hidden`."""
        hidden: torch.Tensor = self.transformer(ids, context, self.dtype)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `CausalModel.logits`."""
        logits: torch.Tensor = self.lm_head(hidden)
        return logits

    def key_sizes(self) -> list[torch.Tensor]:
        """See `CausalModel.key_sizes`."""
        blocks = cast(list[Block], list(self.transformer.h))
        return [block.attn.key_sizes(block.ln_1) for block in blocks]


GGUF_NAMES = {
    "token_embd.weight": "transformer.wte.weight",
    "output_norm.weight": "transformer.ln_f.weight",
    "output.weight": "lm_head.weight",
    "blk.{}.attn_norm.weight": "transformer.h.{}.ln_1.weight",
    "blk.{}.attn_qkv.weight": "transformer.h.{}.attn.c_attn.weight",
    "blk.{}.attn_qkv.bias": "transformer.h.{}.attn.c_attn.bias",
    "blk.{}.attn_output.weight": "transformer.h.{}.attn.c_proj.weight",
    "blk.{}.ffn_norm.weight": "transformer.h.{}.ln_2.weight",
    "blk.{}.ffn_gate.weight": "transformer.h.{}.mlp.w2.weight",
    "blk.{}.ffn_up.weight": "transformer.h.{}.mlp.w1.weight",
    "blk.{}.ffn_down.weight": "transformer.h.{}.mlp.c_proj.weight",
}

_QWEN2_LAYER = {
    "ln_1.weight": ("input_layernorm.weight",),
    "attn.c_attn.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "attn.c_attn.bias": tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
    "attn.c_proj.weight": ("self_attn.o_proj.weight",),
    "ln_2.weight": ("post_attention_layernorm.weight",),
    "mlp.w2.weight": ("mlp.gate_proj.weight",),  # not w1, as its name would suggest
    "mlp.w1.weight": ("mlp.up_proj.weight",),
    "mlp.c_proj.weight": ("mlp.down_proj.weight",),
}
QWEN2_NAMES = {
    "transformer.wte.weight": ("model.embed_tokens.weight",),
    "transformer.ln_f.weight": ("model.norm.weight",),
} | {
    f"transformer.h.{{}}.{ours}": tuple(f"model.layers.{{}}.{name}" for name in theirs)
    for ours, theirs in _QWEN2_LAYER.items()
}

# Buffers that some files carry.
IGNORED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.logn_tensor")

ARCHITECTURE = Architecture(
    model_types=("qwen",),
    gguf_arch="qwen",
    config=read_config,
    build=Model,
    gguf_names=GGUF_NAMES,
    ignored=IGNORED,
    lora_targets=("c_attn", "c_proj", "w1", "w2"),
    dialect="react",
    write_config=write_config,
    qwen2_names=QWEN2_NAMES,
    anatomy=Anatomy(
        embedding="transformer.wte",
        layers="transformer.h",
        norm="transformer.ln_f",
        attention="attn",
        attention_norm="ln_1",
        attention_inputs=("c_attn",),
        attention_output="c_proj",
        mlp_norm="ln_2",
        gate="w2",
        up="w1",
        down="c_proj",
    ),
)
