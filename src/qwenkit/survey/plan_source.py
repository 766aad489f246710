"""Where a plan takes a model's shape from: headers on this machine, a hub's config.json, or, where
neither can be had, the table of published models. No weight is read or downloaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwenkit.checkpoint import open_checkpoint
from qwenkit.checkpoint.client_hubs import client_name
from qwenkit.checkpoint.hub import describe, resolve
from qwenkit.checkpoint.names import EMBEDDED_NAME, parse_hub_name
from qwenkit.errors import ConfigError, ModelNotFoundError, NetworkError
from qwenkit.load import read_architecture
from qwenkit.models.catalogue import published_config
from qwenkit.models.spec import Architecture, ModelConfig, find
from qwenkit.survey.plan_quantized import Quantized, quantized_paths
from qwenkit.survey.plan_quantized import describe as describe_quantized
from qwenkit.tensor_names import tensors_by_our_names

Origin = Literal["files", "hub", "table"]

# The layers that quantizers take, today's and those of the first generation.
_LAYERS = ("_proj.weight", "c_attn.weight", "w1.weight", "w2.weight")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model to plan for. `storages` are the storage tags of its tensors by our names, or how
    those of a layer are quantized; `storage` is that of most bytes. Where nothing is known of
    single tensors, layers are `quantized` or, as all else, stored as `plain`.
    `download_bytes` is what fetching it takes: 0 where it is here already, None where that is
    unknown.
    """

    name: str
    origin: Origin
    architecture: Architecture
    config: ModelConfig
    storage: str
    storages: Mapping[str, str | Quantized]
    download_bytes: int | None

    quantized: Quantized | None = None
    plain: str | None = None

    def storage_of(self, tensor: str) -> str | Quantized:
        """The storage tag of one tensor, or how it is quantized."""
        first_expert = tensor.replace(".experts.", ".experts.0.")
        known = self.storages.get(tensor) or self.storages.get(first_expert)
        if known is None and self.quantized is not None and tensor.endswith(_LAYERS):
            return self.quantized
        return known or self.plain or self.storage


def find_shape(name: str, *, offline: bool = False, revision: str | None = None) -> Shape:
    """The shape of the model that a name means.

    Raises ModelNotFoundError when the name leads nowhere, NetworkError when only a network could
    tell, UsageError for weights that cannot be run, ConfigError or CheckpointError.
    """
    try:
        path = resolve(name, offline=True, revision=revision)
    except ModelNotFoundError:
        if name == EMBEDDED_NAME or client_name(name) is not None:
            raise
        parse_hub_name(name)  # refuses what is no name at all
    else:
        return _from_files(name, path)
    if not offline:
        try:
            return _from_hub(name, revision)
        except NetworkError as error:
            if published_config(name) is None:
                raise NetworkError(f"{error} {_NOT_LISTED}") from error
    config = published_config(name)
    if config is None:
        raise ModelNotFoundError(f"{name} is not on this machine. {_NOT_LISTED}")
    return _from_config(name, config, "table", None)


_NOT_LISTED = (
    "It is not in the table of published Qwen models either: its config.json is needed, in a "
    "folder with the weights or on a hub that can be reached."
)


def _from_files(name: str, path: Path) -> Shape:
    checkpoint = open_checkpoint(path)
    quantized = describe_quantized(checkpoint.config)
    architecture, config = read_architecture(checkpoint)
    tensors = tensors_by_our_names(architecture, checkpoint, config.head_dim)
    held: Counter[str] = Counter()
    for tensor in tensors.values():
        held[tensor.storage] += tensor.size_bytes
    storages: dict[str, str | Quantized] = {n: t.storage for n, t in tensors.items()}
    most = held.most_common(1)[0][0]
    if quantized is not None:
        most = quantized.name
        for layer in quantized_paths({n: t.storage for n, t in tensors.items()}):
            storages[f"{layer}.weight"] = quantized
    return Shape(name, "files", architecture, config, most, storages, 0)


def _from_hub(name: str, revision: str | None) -> Shape:
    described = describe(name, revision=revision)
    if described is None:
        raise ModelNotFoundError(
            f"{name} has GGUF files only, and how they store weights stands in them: fetch one "
            "with 'qwenkit pull' and plan for the file, or plan for the model that they were made "
            "of with --weights int4."
        )
    return _from_config(name, described.config, "hub", described.download_bytes)


def _from_config(
    name: str, config: Mapping[str, Any], origin: Origin, download_bytes: int | None
) -> Shape:
    try:
        quantized = describe_quantized(config)
        architecture = find(str(config.get("model_type")))
        read = architecture.config(config)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    stored = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    most = stored if quantized is None else quantized.name
    return Shape(name, origin, architecture, read, most, {}, download_bytes, quantized, stored)
