"""Fills a built model from a checkpoint: where its tensors become weights in their slots.

A checkpoint's tensors are looked up by the built model's own module paths; a format turns each
linear layer's tensors into a weight in the slot. A tensor left over or missing is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from qwenkit.adapters.lora import Merging
from qwenkit.checkpoint.spec import Checkpoint, StoredTensor
from qwenkit.checkpoint.stacked import as_matrix, gather, unfuse
from qwenkit.errors import CheckpointError, NonFiniteError
from qwenkit.formats.plan import WeightPlan, check_finite, put
from qwenkit.formats.spec import claim
from qwenkit.formats.stacked import StackedWeight
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.linear import Embedding, Linear
from qwenkit.layers.weight import QuantWeight
from qwenkit.models.spec import Architecture, CausalModel
from qwenkit.stored_weight import (
    PLAIN_STORAGES,
    check_shape,
    has_own_format,
    quantization_of,
    read_weight,
)
from qwenkit.tensor_names import tensors_by_our_names

_MATRICES = (Linear, Embedding, GroupedLinear)


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

    Raises CheckpointError naming a tensor that is missing, left over, of another shape or not what
    the config says, ConfigError for a way of storing that is not known, NonFiniteError naming a
    tensor with NaN or infinity in it.
    """
    tensors = tensors_by_our_names(architecture, checkpoint, model.config.head_dim)
    slots = [(n, m) for n, m in model.named_modules() if _has_parameters(m)]
    _arrange_experts(slots, tensors, checkpoint)
    names_below = _names_below(tensors)
    _check_quantized(slots, tensors, names_below, checkpoint)
    tied = getattr(model, "lm_head", None) if model.config.tie_word_embeddings else None
    if merging is not None:
        merging.check(model, tied=tied)
    # A plan copies what it reads: without this a file would be in memory beside its copy.
    releases = {t.release for t in checkpoint.tensors.values() if plan is not None and t.release}
    for done, (path, module) in enumerate(slots):
        if module is tied:
            continue
        place = device if isinstance(device, str) else _device_of(path, device)
        experts: dict[str, dict[str, StoredTensor]] = {}
        if isinstance(module, GroupedLinear) and f"{path}.weight" not in tensors:
            experts = {g: _take(tensors, names_below, g) for g in module.published_paths(path)}
        below = _take(tensors, names_below, path)
        first = next(iter(experts.values()), below)
        matrix = first.get("weight") or next(iter(first.values()), None)
        if isinstance(module, GroupedLinear) and experts:
            _fill_experts(module, experts, checkpoint, place)
        else:
            _fill_module(path, module, below, model.dtype, checkpoint, place, plan)
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
    _refuse_left_over(tensors, architecture, checkpoint)


def fill_part(
    path: str,
    part: nn.Module,
    architecture: Architecture,
    checkpoint: Checkpoint,
    tensors: Mapping[str, StoredTensor],
    *,
    dtype: torch.dtype | None,
) -> None:
    """Fill the modules of one `part` of a model, which is on the meta device and stands at `path`.

    `tensors` are the whole checkpoint's by our names. Plain weights are in `dtype`, None: in that
    which they are stored in; quantized ones are in their format. Raises as `fill`.
    """
    own = {n: t for n, t in tensors.items() if n.startswith(f"{path}.")}
    found = ((f"{path}.{n}" if n else path, m) for n, m in part.named_modules())
    slots = [(n, m) for n, m in found if _has_parameters(m)]
    _arrange_experts(slots, own, checkpoint)
    names_below = _names_below(own)
    for name, module in slots:
        if isinstance(module, GroupedLinear) and f"{name}.weight" not in own:
            experts = {g: _take(own, names_below, g) for g in module.published_paths(name)}
            _fill_experts(module, experts, checkpoint, "cpu")
        else:
            below = _take(own, names_below, name)
            _fill_module(name, module, below, dtype, checkpoint, "cpu", None)
    _refuse_left_over(own, architecture, checkpoint)


def _refuse_left_over(
    tensors: Mapping[str, StoredTensor], architecture: Architecture, checkpoint: Checkpoint
) -> None:
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
            one = next(module.published_paths(path))
            if has_own_format(one, tensors, checkpoint):
                continue  # of several tensors each, which no file has stacked
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


def _check_quantized(
    slots: list[tuple[str, nn.Module]],
    tensors: Mapping[str, StoredTensor],
    names_below: Mapping[str, list[str]],
    checkpoint: Checkpoint,
) -> None:
    """Some weight must be stored as the config says. Raises CheckpointError."""
    given = quantization_of(checkpoint)
    if not given:
        return
    for slot, module in slots:
        for path in _paths(slot, module):
            below = {n[len(path) + 1 :]: tensors[n].storage for n in names_below.get(path, ())}
            if claim(below, given) is not None:
                return
    raise CheckpointError(
        checkpoint.path,
        "quantization_config",
        f"says {given.get('quant_method')!r}, but no weight is stored so. Remove it where the "
        "weights are plain, or get them from the quantized model's repository.",
    )


def _names_below(tensors: Mapping[str, StoredTensor]) -> dict[str, list[str]]:
    """The tensors' names by every path that they stand below."""
    names: dict[str, list[str]] = {}
    for name in tensors:
        at = name.rfind(".")
        while at > 0:
            names.setdefault(name[:at], []).append(name)
            at = name.rfind(".", 0, at)
    return names


def _paths(path: str, module: nn.Module) -> Iterator[str]:
    """Where the matrices of a module stand in published checkpoints."""
    if isinstance(module, GroupedLinear):
        yield from module.published_paths(path)
    elif isinstance(module, _MATRICES):
        yield path


def _take(
    tensors: dict[str, StoredTensor], names: Mapping[str, list[str]], path: str
) -> dict[str, StoredTensor]:
    """The tensors below a path, by the rest of their names; they are taken out."""
    return {n[len(path) + 1 :]: tensors.pop(n) for n in names.get(path, ()) if n in tensors}


def _fill_module(
    path: str,
    module: nn.Module,
    below: dict[str, StoredTensor],
    dtype: torch.dtype | None,
    checkpoint: Checkpoint,
    device: str,
    plan: WeightPlan | None,
) -> None:
    expected = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    matrix = below.get("weight") or next(iter(below.values()), None)
    if isinstance(module, _MATRICES):
        weight = read_weight(path, below, expected["weight"], checkpoint)
        if weight is not None:
            del module.weight, expected["weight"]
            module.weight = weight.to(device)
            _take_bias(path, module, below, expected)
            if plan is None and matrix is not None:
                with _blaming(matrix):
                    check_finite(module.weight)
    for part, shape in expected.items():
        name = f"{path}.{part}"
        stored = below.pop(part, None)
        check_shape(checkpoint, name, stored, shape, below)
        assert stored is not None
        if stored.storage not in PLAIN_STORAGES:
            raise CheckpointError(
                stored.file, name, f"no known format reads tensors stored as {stored.storage}."
            )
        value = stored.read()
        planned = plan is not None and part == "weight" and isinstance(module, _MATRICES)
        value = value.to(device=device, dtype=None if planned else dtype)
        if not planned:
            with _blaming(stored):
                check_finite(value)
        setattr(module, part, nn.Parameter(value, requires_grad=False))
    if below:
        names = ", ".join(f"{path}.{part}" for part in sorted(below))
        raise CheckpointError(
            checkpoint.path, "tensors", f"belong to no part of the model: {names}."
        )


def _fill_experts(
    module: GroupedLinear,
    experts: Mapping[str, dict[str, StoredTensor]],
    checkpoint: Checkpoint,
    device: str,
) -> None:
    """The weight of a grouped layer whose groups have several tensors each."""
    parts = []
    for path, below in experts.items():
        matrix = next(iter(below.values()), None)
        shape = module.out_features, module.in_features
        weight = read_weight(path, below, shape, checkpoint)
        if weight is None or matrix is None:
            check_shape(checkpoint, f"{path}.weight", None, shape, below)
            raise AssertionError("a weight that no format reads is refused")
        _take_bias(path, module, below, {})
        if below:
            names = ", ".join(f"{path}.{part}" for part in sorted(below))
            raise CheckpointError(
                checkpoint.path, "tensors", f"belong to no part of the model: {names}."
            )
        with _blaming(matrix):
            check_finite(weight)
        parts.append(weight.to(device))
    del module.weight
    module.weight = StackedWeight(parts)


def _take_bias(
    path: str,
    module: nn.Module,
    below: dict[str, StoredTensor],
    expected: dict[str, tuple[int, ...]],
) -> None:
    """Some quantizers give every layer a bias: one of zeros is dropped where the model has none.

    Another is refused when it is left over.
    """
    stored = below.get("bias")
    if stored is not None and "bias" not in expected and stored.storage in PLAIN_STORAGES:
        given = stored.read()
        if len(given) == getattr(module, "out_features", None) and not bool(given.any()):
            del below["bias"]


@contextmanager
def _blaming(stored: StoredTensor) -> Iterator[None]:
    """Say of numbers that are not finite which file and tensor they come from."""
    try:
        yield
    except NonFiniteError as error:
        told = str(error).removeprefix(f"{stored.name}: ")
        raise NonFiniteError(f"{stored.file}: {stored.name}: {told}") from error


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
    if stored is not None:
        refuse_another(weight, stored, plan)
    del head.weight
    head.weight = weight


def refuse_another(
    weight: nn.Parameter | QuantWeight, stored: StoredTensor, plan: WeightPlan | None = None
) -> None:
    """Raises CheckpointError for a stored head that is not the embedding's `weight`, which is to be
    both.
    """
    if not _same(weight, stored, plan):
        raise CheckpointError(
            stored.file,
            "lm_head.weight",
            "differs from the embedding although config.json says tie_word_embeddings; "
            "set it to false to use both.",
        )


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
