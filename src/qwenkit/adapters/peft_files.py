"""An adapter as PEFT's files hold it: tensors by name, beside their config.

Below the prefix `base_model.model.` stands the module's published path, then `lora_A.weight` [rank,
in_features] and `lora_B.weight` [out_features, rank]; a trained bias replaces the module's own, and
a module of `modules_to_save` is
there whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from qwenkit.adapters.config import AdapterConfig
from qwenkit.errors import CheckpointError, NonFiniteError
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.linear import Embedding, Linear

PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias)")
_BIAS = re.compile(r"(.+?)(?:\.base_layer)?\.bias")
_WHOLE = re.compile(r"(.+?)(?:\.base_layer)?\.weight")
_EMBEDDINGS = ("embed_tokens", "wte", "lm_head")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """What one linear layer gets added: x downᵀ upᵀ · scaling, and `up_bias` · scaling.

    `down` is [rank, in_features], `up` [out_features, rank], as they were stored.
    """

    down: torch.Tensor
    up: torch.Tensor
    scaling: float
    up_bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class LoraAdapter:
    """One adapter. `low_ranks` are by module path, `biases` replace a module's own, `weights` are
    the modules that were trained whole. `file` is where the tensors came from, for messages.
    """

    file: str
    config: AdapterConfig
    low_ranks: Mapping[str, LowRank]
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensors as they were stored."""
        return sum(t.numel() * t.element_size() for t in to_tensors(self).values())


def from_tensors(
    config: AdapterConfig, tensors: Mapping[str, torch.Tensor], *, file: object
) -> LoraAdapter:
    """An adapter of the tensors of a file. Raises CheckpointError naming file and tensor for names
    left over or missing and shapes that do not fit, NonFiniteError for NaN and infinities.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    biases: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        _check_numbers(file, name, tensor)
        inner = name.removeprefix(PREFIX)
        if inner == name:
            raise CheckpointError(file, name, f"is no name of PEFT's: they begin with {PREFIX!r}.")
        if match := _PART.fullmatch(inner):
            parts.setdefault(match[1], {})[match[2]] = tensor
        elif "lora_" in inner:
            raise CheckpointError(
                file, name, "is of a kind that is not supported; merge the adapter with peft."
            )
        elif (match := _BIAS.fullmatch(inner)) and config.bias != "none":
            biases[match[1]] = tensor
        elif (match := _WHOLE.fullmatch(inner)) and _is_saved(config, match[1]):
            weights[match[1]] = tensor
        else:
            raise CheckpointError(file, name, "is nothing that adapter_config.json speaks of.")
    if not parts:
        raise CheckpointError(file, "tensors", "there is no lora_A and lora_B among them.")
    low_ranks = {path: _low_rank(file, config, path, given) for path, given in parts.items()}
    return LoraAdapter(str(file), config, low_ranks, biases, weights)


def to_tensors(adapter: LoraAdapter) -> dict[str, torch.Tensor]:
    """The inverse of `from_tensors`: the same names, shapes, dtypes and bytes."""
    tensors: dict[str, torch.Tensor] = {}
    for path, pair in adapter.low_ranks.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = pair.down
        tensors[f"{PREFIX}{path}.lora_B.weight"] = pair.up
        if pair.up_bias is not None:
            tensors[f"{PREFIX}{path}.lora_B.bias"] = pair.up_bias
    for path, bias in adapter.biases.items():
        step = "base_layer.bias" if path in adapter.low_ranks else "bias"
        tensors[f"{PREFIX}{path}.{step}"] = bias
    for path, weight in adapter.weights.items():
        step = "base_layer.weight" if path in adapter.low_ranks else "weight"
        tensors[f"{PREFIX}{path}.{step}"] = weight
    return tensors


def _is_saved(config: AdapterConfig, path: str) -> bool:
    """Whether a module may be there whole: trained so, or an embedding or head, of which PEFT
    writes copies when the head is adapted or rows were added.
    """
    named = (*config.modules_to_save, *_EMBEDDINGS)
    return any(path == m or path.endswith(f".{m}") for m in named)


def _low_rank(
    file: object, config: AdapterConfig, path: str, given: Mapping[str, torch.Tensor]
) -> LowRank:
    for part in ("lora_A.weight", "lora_B.weight"):
        if part not in given:
            raise CheckpointError(file, f"{PREFIX}{path}.{part}", "is missing.")
    if not config.is_target(path):
        raise CheckpointError(
            file,
            f"{PREFIX}{path}.lora_A.weight",
            "adapter_config.json does not target this module.",
        )
    down, up, rank = given["lora_A.weight"], given["lora_B.weight"], config.rank_of(path)
    for part, size in (("lora_A.weight", 0), ("lora_B.weight", 1)):
        shape = tuple(given[part].shape)
        if len(shape) != 2 or shape[size] != rank or 0 in shape:
            raise CheckpointError(
                file,
                f"{PREFIX}{path}.{part}",
                f"has shape {shape}; with rank {rank} of adapter_config.json it must be "
                f"{('(out_features, rank)' if size else '(rank, in_features)')}.",
            )
    bias = given.get("lora_B.bias")
    if bias is not None and bias.shape != (up.shape[0],):
        raise CheckpointError(
            file,
            f"{PREFIX}{path}.lora_B.bias",
            f"has shape {tuple(bias.shape)}, not {up.shape[0]}.",
        )
    return LowRank(down, up, config.scaling_of(path), bias)


def _check_numbers(file: object, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(file, name, f"is stored as {tensor.dtype}, not as plain numbers.")
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"{file}: {name}: has NaN or infinite numbers; fetch the file again.")


def check_fits(adapter: LoraAdapter, model: nn.Module) -> None:
    """Raise CheckpointError naming file and module unless the adapter is one of this model: every
    module is there with the adapter's sizes, and every one that the config targets is adapted.
    """
    modules = dict(model.named_modules())
    for path, pair in adapter.low_ranks.items():
        linear = _linear(adapter, modules, path)
        shape = (pair.up.shape[0], pair.down.shape[1])
        own = (linear.out_features, linear.in_features)
        if shape != own:
            raise CheckpointError(
                adapter.file, path, f"is adapted as {shape}, but the model's matrix is {own}."
            )
    for path, bias in adapter.biases.items():
        own_bias = _linear(adapter, modules, path).bias
        if own_bias is None or own_bias.shape != bias.shape:
            has = "none" if own_bias is None else f"one of {tuple(own_bias.shape)}"
            raise CheckpointError(
                adapter.file, f"{path}.bias", f"has shape {tuple(bias.shape)}; the model has {has}."
            )
    for path, weight in adapter.weights.items():
        _check_whole(adapter, modules, path, weight)
    missing = [path for path in _targets(adapter, modules) if path not in adapter.low_ranks]
    if missing:
        raise CheckpointError(
            adapter.file,
            f"{PREFIX}{missing[0]}.lora_A.weight",
            f"is missing, as are those of {len(missing) - 1} more modules that "
            "adapter_config.json targets in this model.",
        )


def _linear(adapter: LoraAdapter, modules: Mapping[str, nn.Module], path: str) -> Linear:
    module = modules.get(path)
    if type(module) is Linear:
        return module
    parent, _, name = path.rpartition(".")
    if isinstance(modules.get(f"{parent.rpartition('.')[0]}.{name}"), GroupedLinear):
        raise CheckpointError(adapter.file, path, "adapters of single experts are not supported.")
    what = "is no plain linear layer" if module is not None else "is not there"
    raise CheckpointError(
        adapter.file, path, f"{what} in this model; the adapter belongs to another one."
    )


def _check_whole(
    adapter: LoraAdapter, modules: Mapping[str, nn.Module], path: str, weight: torch.Tensor
) -> None:
    module = modules.get(path)
    if not isinstance(module, Linear | Embedding):
        raise CheckpointError(
            adapter.file, path, "modules_to_save: only linear layers and embeddings are supported."
        )
    own = tuple(module.weight.shape)
    if tuple(weight.shape) != own:
        raise CheckpointError(
            adapter.file,
            f"{path}.weight",
            f"has shape {tuple(weight.shape)}; the model's is {own}.",
        )


def _targets(adapter: LoraAdapter, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The modules that the config names. What a pattern of its own meets depends on what else the
    model had that it was trained with, so only names are held to.
    """
    if isinstance(adapter.config.targets, str):
        return
    for path, module in modules.items():
        if type(module) is Linear and adapter.config.is_target(path):
            yield path
