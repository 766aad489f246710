"""Room 4: a checkpoint's path becomes a built model with its tokenizer and record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qwenkit.adapters.lora import Merging
from qwenkit.checkpoint import open_checkpoint
from qwenkit.checkpoint.spec import Checkpoint
from qwenkit.errors import CheckpointError, ConfigError, TokenizerError, UsageError
from qwenkit.fill import fill
from qwenkit.formats.plan import WeightPlan
from qwenkit.kernels.cpu import give_back_freed_memory
from qwenkit.kernels.devices import choose_precision, find_device
from qwenkit.models.spec import Architecture, CausalModel, ModelConfig, find
from qwenkit.record import read_record
from qwenkit.tokenizer import BytePairTokenizer, from_folder, from_gguf
from qwenkit.types.record import ModelRecord

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A built model with everything its checkpoint says."""

    model: CausalModel
    config: ModelConfig
    record: ModelRecord
    tokenizer: BytePairTokenizer
    checkpoint: Checkpoint


def load(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: str | Mapping[str, str] = "cpu",
    plan: WeightPlan | None = None,
    merging: Merging | None = None,
    progress: Callable[[float], None] | None = None,
) -> Loaded:
    """Build the model of a checkpoint (folder or .gguf file) and its tokenizer.

    `dtype` is that of the activations, chosen by `kernels/devices.py: choose_precision`. `device`
    is one for everything, or that of each part by its module path. Weights stay as they are stored
    where that can be: in their quantized format, memory-mapped; with a `plan` they become what
    native kernels read. `merging` puts an adapter into the weights, before they are packed or
    rounded. `progress` is called with the share done, 0 to 1.

    Raises CheckpointError, ConfigError, NonFiniteError, TokenizerError or UsageError.
    """
    if not isinstance(device, str | Mapping):
        raise UsageError(f"device: expected a name, or one for each module path, got {device!r}.")
    checkpoint = open_checkpoint(path)
    tokenizer = load_tokenizer(checkpoint)
    architecture, config = read_architecture(checkpoint)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            checkpoint.path,
            "vocab_size",
            f"the tokenizer has {tokenizer.vocab_size} ids, the embedding only "
            f"{config.vocab_size} rows; these files do not belong together.",
        )
    check_layers(checkpoint, config)
    with torch.device("meta"):
        model = architecture.build(config)
    model.dtype = _compute_dtype(checkpoint, dtype, device, plan)
    fill(
        model,
        architecture,
        checkpoint,
        device=device,
        plan=plan,
        merging=merging,
        progress=progress,
    )
    if plan is not None:
        give_back_freed_memory()  # of what was packed
    record = read_record(checkpoint, tokenizer, config)
    return Loaded(model.eval(), config, record, tokenizer, checkpoint)


def load_tokenizer(
    checkpoint: Checkpoint, *, extra_vocab_file: Path | None = None
) -> BytePairTokenizer:
    """The tokenizer that a checkpoint carries, with the tokens of `extra_vocab_file` if given.

    Raises TokenizerError naming file and field.
    """
    try:
        if checkpoint.folder is None:
            return from_gguf(checkpoint.gguf_metadata, extra_vocab_file=extra_vocab_file)
        return from_folder(checkpoint.folder, extra_vocab_file=extra_vocab_file)
    except TokenizerError as error:
        if str(checkpoint.path) in str(error):  # a folder's reader knows which of its files it is
            raise
        raise TokenizerError(f"{checkpoint.path}: {error}") from error


def read_architecture(checkpoint: Checkpoint) -> tuple[Architecture, ModelConfig]:
    """The architecture of a checkpoint and its config. Raises ConfigError naming file and key."""
    try:
        architecture = find(str(checkpoint.config.get("model_type")))
        block = checkpoint.config.get("quantization_config")
        if block is not None and not isinstance(block, Mapping):
            raise ConfigError(f"quantization_config: expected an object, got {block!r}.")
        return architecture, architecture.config(checkpoint.config)
    except ConfigError as error:
        folder = checkpoint.folder
        file = checkpoint.path if folder is None else folder / "config.json"
        raise ConfigError(f"{file}: {error}") from error


def check_layers(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """A damaged count must not be built: modules alone fill the memory. Raises CheckpointError."""
    layers, stored = config.num_hidden_layers, len(checkpoint.tensors)
    if layers > stored:
        raise CheckpointError(
            checkpoint.path,
            "num_hidden_layers",
            f"got {layers}, but there are only {stored} tensors, and every layer has some.",
        )


def _compute_dtype(
    checkpoint: Checkpoint, dtype: str, device: str | Mapping[str, str], plan: WeightPlan | None
) -> torch.dtype:
    names = {device} if isinstance(device, str) else set(device.values())
    devices = [find_device(name) for name in sorted(names)]
    native = plan is not None and all(found.is_cpu for found in devices)
    precision = choose_precision(dtype, matrix_storages(checkpoint), devices, native=native)
    for remark in precision.remarks:
        _log.warning("%s", remark)
    return precision.dtype


def matrix_storages(checkpoint: Checkpoint) -> set[str]:
    """The storage tags of a checkpoint's matrices."""
    return {
        stored.storage
        for name, stored in checkpoint.tensors.items()
        if len(stored.shape) > 1 and not name.endswith(".scales")  # of quantized ones
    }
