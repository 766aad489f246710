"""Room 4: the only place where model × checkpoint × format meet.

A checkpoint's tensors are looked up by the built model's own module paths; a format turns each
linear layer's tensors into a weight in the slot. A tensor left over or missing is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qwenkit.adapters.lora import Merging
from qwenkit.checkpoint import open_checkpoint
from qwenkit.checkpoint.spec import Checkpoint, StoredTensor
from qwenkit.checkpoint.stacked import as_matrix, gather, unfuse
from qwenkit.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    TokenizerError,
    UsageError,
)
from qwenkit.formats.plan import WeightPlan, check_finite, put
from qwenkit.formats.spec import Format, claim
from qwenkit.kernels.cpu import give_back_freed_memory
from qwenkit.kernels.devices import choose_precision, find_device
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.linear import Embedding, Linear
from qwenkit.layers.weight import QuantWeight
from qwenkit.models.spec import Architecture, CausalModel, ModelConfig, find
from qwenkit.record import read_record
from qwenkit.tensor_names import tensors_by_our_names
from qwenkit.tokenizer import BytePairTokenizer, from_folder, from_gguf
from qwenkit.types.record import ModelRecord

PLAIN_STORAGES = ("F32", "F16", "BF16", "F64")
_log = logging.getLogger(__name__)
_MATRICES = (Linear, Embedding, GroupedLinear)


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


def fill(
    model: CausalModel,
    architecture: Architecture,
    checkpoint: Checkpoint,
    *,
    device: str | Mapping[str, str] = "cpu",
    plan: WeightPlan | None = None,
    merging: Merging | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Put every tensor of the checkpoint into its slot of a model built on the meta device.

    Raises CheckpointError naming a tensor that is missing, left over or of another shape,
    NonFiniteError naming one with NaN or infinity in it.
    """
    tensors = tensors_by_our_names(architecture, checkpoint, model.config.head_dim)
    slots = [(n, m) for n, m in model.named_modules() if _has_parameters(m)]
    _arrange_experts(slots, tensors, checkpoint)
    tied = getattr(model, "lm_head", None) if model.config.tie_word_embeddings else None
    if merging is not None:
        merging.check(model, tied=tied)
    # A plan copies what it reads: without this a file would be in memory beside its copy.
    releases = {t.release for t in checkpoint.tensors.values() if plan is not None and t.release}
    for done, (path, module) in enumerate(slots):
        if module is tied:
            continue
        below = {p: tensors.pop(f"{path}.{p}") for p in _parts(tensors, path)}
        place = device if isinstance(device, str) else _device_of(path, device)
        matrix = below.get("weight") or next(iter(below.values()), None)
        _fill_module(path, module, below, model, checkpoint, place, plan)
        if merging is not None:
            merging.into(path, module, model.dtype)
        if plan is not None and isinstance(module, _MATRICES):
            is_head = isinstance(module, Embedding) or path == "lm_head"
            assert matrix is not None, "a missing matrix is refused"
            with _blaming(matrix):
                put(module, plan.apply(path, module.weight, is_head=is_head))
        for release in releases:
            release()
        if progress is not None:
            progress((done + 1) / len(slots))
    if tied is not None:
        _tie(model, tied, tensors.pop("lm_head.weight", None), checkpoint, plan)
    left = [n for n in tensors if not n.endswith(architecture.ignored)]
    if left:
        names = ", ".join(sorted(left)[:5])
        raise CheckpointError(
            checkpoint.path, "tensors", f"{len(left)} belong to no part of the model: {names}."
        )


def _arrange_experts(
    slots: list[tuple[str, nn.Module]], tensors: dict[str, StoredTensor], checkpoint: Checkpoint
) -> None:
    """Bring the experts' tensors into the one layout that the modules have."""
    unfuse(tensors)
    for path, module in slots:
        if isinstance(module, GroupedLinear):
            gather(
                tensors,
                path,
                groups=module.groups,
                paths=module.published_paths(path),
                shape=(module.out_features, module.in_features),
                checkpoint=checkpoint.path,
            )
        elif isinstance(module, Linear) and module.out_features == 1:
            stored = tensors.get(f"{path}.weight")
            if stored is not None and checkpoint.container == "gguf":  # which drops sizes of one
                tensors[f"{path}.weight"] = as_matrix(stored)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _device_of(path: str, devices: Mapping[str, str]) -> str:
    """The device of the part that a module is or belongs to."""
    return next(d for part, d in devices.items() if f"{path}.".startswith(f"{part}."))


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
    return {t.storage for t in checkpoint.tensors.values() if len(t.shape) > 1}


def _parts(tensors: Mapping[str, StoredTensor], path: str) -> list[str]:
    prefix = f"{path}."
    return [n[len(prefix) :] for n in tensors if n.startswith(prefix)]


def _fill_module(
    path: str,
    module: nn.Module,
    below: dict[str, StoredTensor],
    model: CausalModel,
    checkpoint: Checkpoint,
    device: str,
    plan: WeightPlan | None,
) -> None:
    expected = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    matrix = below.get("weight") or next(iter(below.values()), None)
    if isinstance(module, _MATRICES):
        storage = {part: t.storage for part, t in below.items() if part != "bias"}
        chosen = claim(storage, checkpoint.config.get("quantization_config") or {})
        if chosen is not None:
            rows, columns = expected.pop("weight")
            _check_shape(checkpoint, f"{path}.weight", below.get("weight"), (rows, columns))
            weight = _quantized(path, chosen, below, storage, (rows, columns))
            del module.weight
            module.weight = weight.to(device)
            if plan is None and matrix is not None:
                with _blaming(matrix):
                    check_finite(module.weight)
    for part, shape in expected.items():
        name = f"{path}.{part}"
        stored = below.pop(part, None)
        _check_shape(checkpoint, name, stored, shape)
        assert stored is not None
        if stored.storage not in PLAIN_STORAGES:
            raise CheckpointError(
                stored.file, name, f"no known format reads tensors stored as {stored.storage}."
            )
        value = stored.read()
        planned = plan is not None and part == "weight" and isinstance(module, _MATRICES)
        value = value.to(device=device, dtype=None if planned else model.dtype)
        if not planned:
            with _blaming(stored):
                check_finite(value)
        setattr(module, part, nn.Parameter(value, requires_grad=False))
    if below:
        names = ", ".join(f"{path}.{part}" for part in sorted(below))
        raise CheckpointError(
            checkpoint.path, "tensors", f"belong to no part of the model: {names}."
        )


@contextmanager
def _blaming(stored: StoredTensor) -> Iterator[None]:
    """Say of numbers that are not finite which file and tensor they come from."""
    try:
        yield
    except NonFiniteError as error:
        told = str(error).removeprefix(f"{stored.name}: ")
        raise NonFiniteError(f"{stored.file}: {stored.name}: {told}") from error


def _quantized(
    path: str,
    chosen: Format,
    below: dict[str, StoredTensor],
    storage: Mapping[str, str],
    shape: tuple[int, int],
) -> QuantWeight:
    """The weight of a layer in its storage format; takes its tensors out of `below`."""
    stored = {part: below.pop(part) for part in storage}
    tag = storage.get("weight", chosen.name)
    try:
        tensors = {part: tensor.read() for part, tensor in stored.items()}
        return chosen.weight.from_tensors(tensors, shape=shape, storage=tag)
    except CheckpointError as error:
        file = next(iter(stored.values())).file
        raise CheckpointError(file, path, f"cannot be read as {tag}: {error}") from error


def _check_shape(
    checkpoint: Checkpoint, name: str, stored: StoredTensor | None, shape: tuple[int, ...]
) -> None:
    if stored is None:
        raise CheckpointError(checkpoint.path, name, f"is missing; the model needs it, {shape}.")
    if stored.shape != shape:
        raise CheckpointError(
            stored.file, name, f"has shape {stored.shape}; config.json asks for {shape}."
        )


def _tie(
    model: CausalModel,
    head: nn.Module,
    stored: StoredTensor | None,
    checkpoint: Checkpoint,
    plan: WeightPlan | None,
) -> None:
    """Make the head use the embedding's own weight; a head in the file must be the same."""
    embedding = next(m for m in model.modules() if isinstance(m, Embedding))
    weight = embedding.weight
    if stored is not None and not _same(weight, stored, plan):
        raise CheckpointError(
            stored.file,
            "lm_head.weight",
            "differs from the embedding although config.json says tie_word_embeddings; "
            "set it to false to use both.",
        )
    del head.weight
    head.weight = weight


def _same(
    weight: nn.Parameter | QuantWeight, stored: StoredTensor, plan: WeightPlan | None
) -> bool:
    if stored.storage not in PLAIN_STORAGES:
        return False
    value: torch.Tensor | QuantWeight = stored.read()
    if plan is not None:
        value = plan.apply("lm_head", value, is_head=True)
    if isinstance(weight, QuantWeight) and isinstance(value, QuantWeight):
        ours, theirs = dict(weight.named_buffers()), dict(value.named_buffers())
        return ours.keys() == theirs.keys() and all(
            torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
        )
    if isinstance(weight, torch.Tensor) and isinstance(value, torch.Tensor):
        return torch.equal(weight, value.to(weight.dtype))
    return False
