"""What a checkpoint is, read from its headers and configuration: no weight is read, nothing runs.

Parameters are counted on the architecture itself, built without memory from the shapes that the
configuration gives; bytes are those of the file. Must not know how anything is shown.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from qwenkit.checkpoint import open_checkpoint
from qwenkit.checkpoint.spec import Checkpoint, Container
from qwenkit.layers.linear import Embedding
from qwenkit.layers.norm import RMSNorm
from qwenkit.load import load_tokenizer, read_architecture
from qwenkit.models.spec import Architecture, CausalModel, ModelConfig
from qwenkit.record import read_record
from qwenkit.tensor_names import tensors_by_our_names
from qwenkit.types.record import ModelRecord

PartName = Literal["embedding", "attention", "mlp", "norms", "head", "other"]
PART_NAMES: tuple[PartName, ...] = ("embedding", "attention", "mlp", "norms", "head", "other")


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of weights: how many numbers the model has of it, and their bytes in the file."""

    name: PartName
    parameters: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a checkpoint is.

    `parameters` counts a matrix that two layers share once; `non_embedding_parameters` leaves out
    the embedding and an untied head. `storages` is bytes by storage tag, largest first.
    `kv_bytes_per_token` is the cache of one token in all layers at two bytes a number. `stops`
    pairs the ids that end an output with their text. `template` is the chat template's first line.
    `padded_rows` are rows of the embedding that stand for no token.
    """

    path: Path
    container: Container
    architecture: str
    shapes: Mapping[str, int | float | bool]
    parameters: int
    non_embedding_parameters: int
    stored_bytes: int
    parts: tuple[Part, ...]
    storages: Mapping[str, int]
    kv_bytes_per_token: int
    padded_rows: int
    template: str | None
    stops: tuple[tuple[int, str], ...]
    record: ModelRecord


def inspect(path: Path) -> ModelInfo:
    """Read what the checkpoint at `path` (a folder or a .gguf file) is.

    Raises CheckpointError, ConfigError or TokenizerError as loading it would.
    """
    checkpoint = open_checkpoint(path)
    tokenizer = load_tokenizer(checkpoint)
    architecture, config = read_architecture(checkpoint)
    record = read_record(checkpoint, tokenizer, config)
    counted = count_parameters(architecture, config)
    stored = _stored_bytes(architecture, config, checkpoint)
    storages: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        storages[tensor.storage] += tensor.size_bytes
    used = [p for p in PART_NAMES if counted[p] or stored[p]]
    return ModelInfo(
        path=checkpoint.path,
        container=checkpoint.container,
        architecture=record.model_type,
        shapes=_shapes(config),
        parameters=counted.total(),
        non_embedding_parameters=counted.total() - counted["embedding"] - counted["head"],
        stored_bytes=storages.total(),
        parts=tuple(Part(name, counted[name], stored[name]) for name in used),
        storages=dict(storages.most_common()),
        kv_bytes_per_token=kv_bytes_per_token(config),
        padded_rows=config.vocab_size - tokenizer.vocab_size,
        template=_first_line(checkpoint.chat_template),
        stops=tuple((i, tokenizer.decode([i])) for i in record.stop_token_ids),
        record=record,
    )


def count_parameters(architecture: Architecture, config: ModelConfig) -> Counter[PartName]:
    """Numbers in each part of a model of these shapes; a tied head has none of its own."""
    counted: Counter[PartName] = Counter()
    seen: set[int] = set()
    for path, module in _built(architecture, config).named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counted[_part(path, module)] += parameter.numel()
    return counted


def kv_bytes_per_token(config: ModelConfig, *, bytes_per_number: int = 2) -> int:
    """Bytes that the keys and values of one token take in all layers."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * bytes_per_number


def _built(architecture: Architecture, config: ModelConfig) -> CausalModel:
    with torch.device("meta"):
        return architecture.build(config)


def _part(path: str, module: nn.Module) -> PartName:
    steps = path.split(".")
    if isinstance(module, Embedding):
        return "embedding"
    if isinstance(module, RMSNorm):
        return "norms"
    if steps[-1] == "lm_head":
        return "head"
    if any("attn" in step for step in steps):
        return "attention"
    return "mlp" if "mlp" in steps else "other"


def _stored_bytes(
    architecture: Architecture, config: ModelConfig, checkpoint: Checkpoint
) -> Counter[PartName]:
    """Bytes of the file in each part, a quantized layer's several tensors together."""
    modules = dict(_built(architecture, config).named_modules())
    stored: Counter[PartName] = Counter()
    for name, tensor in tensors_by_our_names(architecture, checkpoint, config.head_dim).items():
        owner = next((path for path in _ancestors(name) if path in modules), "")
        stored[_part(owner, modules[owner])] += tensor.size_bytes
    return stored


def _ancestors(name: str) -> Iterator[str]:
    """The dotted paths above a tensor's name, nearest first: "a.b.c" gives "a.b" and "a"."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _shapes(config: Any) -> dict[str, int | float | bool]:
    """The numbers among the config's fields."""
    values = ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    return {name: value for name, value in values if isinstance(value, int | float)}


def _first_line(template: str | None) -> str | None:
    """The first line of a template that says anything, without the rest."""
    lines = (template or "").splitlines()
    return next((line.strip() for line in lines if line.strip()), None)
