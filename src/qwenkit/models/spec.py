"""What an architecture file offers, and how it is found.

Each module of this folder ends in a constant `ARCHITECTURE`. Its modules' paths equal the names in
the published weights, so that loading is a lookup.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import nn

import qwenkit.models
from qwenkit.errors import ConfigError, suggest
from qwenkit.layers.attention import AttentionContext
from qwenkit.layers.position import Position


class ModelConfig(Protocol):
    """What every architecture's frozen config offers to rooms that know no architecture."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def position(self) -> Position: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


class CausalModel(nn.Module):
    """Base of every model: flat tokens and a context in, logits out.

    A subclass has `hidden` and `logits`. `dtype` is what activations are computed in; weights may
    be stored otherwise.
    """

    config: ModelConfig
    dtype: torch.dtype

    def forward(self, ids: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """ids [tokens] int64 to logits [rows, vocab_size] of the rows that the context selects."""
        return self.logits(self.hidden(ids, context))

    def hidden(self, ids: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """ids [tokens] int64 to the normalised rows that the head is given: [rows, hidden_size]."""
        raise AssertionError(f"{type(self).__name__} has no hidden")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What `hidden` gives, [rows, hidden_size], to logits [rows, vocab_size]."""
        raise AssertionError(f"{type(self).__name__} has no logits")

    def key_sizes(self) -> Sequence[torch.Tensor | None]:
        """Of each layer how large its unrotated keys are to be expected from weights alone, root
        mean squares [kv_heads, head_dim]; None where that cannot be said.
        """
        return [None] * self.config.num_hidden_layers


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Where the parts of a decoder stand, for what works on it layer by layer.

    `embedding`, `layers` and `norm` are module paths; the rest are names within a layer, whose
    output is x + attention(norm(x)), then x + mlp(norm(x)). `attention_inputs` read the normalised
    x, `attention_output` reads what attention gives. `gate`, `up` and `down` are those of a dense
    feed-forward part.
    """

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    attention_inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    attention_output: str = "o_proj"
    mlp: str = "mlp"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture.

    `config` reads a `config.json` dictionary, old and new layouts, and raises ConfigError naming
    the key. `gguf_names` maps a GGUF tensor name to ours, with `{}` for the layer number; a name of
    `gguf_parts` is in no file: its rows are those of several tensors there, one after another, in
    equal parts. Tensors of `gguf_interleaved` ("attn_q") have their rows in GGUF's pairwise rotary
    order and are put back in rotate-half order on loading. Modules of `gguf_unit_rows` (our paths)
    get rows of length one there, for other engines do not divide by it. `ignored` are tensor names
    that old files carry but no model needs. `lora_targets` are the linear layers that adapters wrap
    by default. `write_config` is the inverse of `config`, where the published keys are not those
    that a GGUF's metadata are translated to. `qwen2_names` are the names of the same weights in
    Qwen2's layout, if it can hold them: the first generation joins the rows of several in one
    tensor. `anatomy` says where the parts stand.
    """

    model_types: tuple[str, ...]
    gguf_arch: str
    config: Callable[[Mapping[str, Any]], ModelConfig]
    build: Callable[[Any], CausalModel]
    gguf_names: Mapping[str, str]
    gguf_parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gguf_interleaved: tuple[str, ...] = ()
    gguf_unit_rows: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ()
    dialect: str | None = None
    write_config: Callable[[Any], dict[str, Any]] | None = None
    qwen2_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    anatomy: Anatomy = Anatomy()


@cache
def architectures() -> dict[str, Architecture]:
    """Every architecture of this folder by each of its model types."""
    found: dict[str, Architecture] = {}
    for info in pkgutil.iter_modules(qwenkit.models.__path__):
        module = importlib.import_module(f"qwenkit.models.{info.name}")
        architecture = getattr(module, "ARCHITECTURE", None)
        if architecture is not None:
            found |= dict.fromkeys(architecture.model_types, cast(Architecture, architecture))
    return found


def find(model_type: str) -> Architecture:
    """The architecture of a `model_type`. Raises ConfigError naming the known ones."""
    known = architectures()
    if model_type not in known:
        raise ConfigError(f"model_type: got {model_type!r}. {suggest(str(model_type), known)}")
    return known[model_type]
