"""What a model's weights take in memory, and on the way there, from shapes alone.

The model is built without memory and every matrix packed without numbers, by the code that packs
real ones: only that code knows how many bytes come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from qwenkit.formats.ggml import GgmlWeight
from qwenkit.formats.packed import PackedWeight, fitting_group, pack
from qwenkit.formats.plan import BITSANDBYTES_KINDS, WeightPlan
from qwenkit.kernels.blocks import BLOCK_LAYOUTS
from qwenkit.kernels.packed import PANEL_ROWS
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.linear import Embedding, Linear
from qwenkit.layers.moe import SparseMoe
from qwenkit.models.spec import Architecture, CausalModel, ModelConfig
from qwenkit.survey.plan_quantized import Quantized, four_bits

StorageOf = Callable[[str], str | Quantized]

DEFAULT_GROUPS = {"int4": 32, "int8": 128}  # of `PackedWeight.round_to_nearest`
DEFAULT_GROUPS |= dict.fromkeys(BITSANDBYTES_KINDS, 64)

_PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_ROUNDING = ("BF16", "Q4_0", "Q4_1", "Q8_0")  # packed types but fp32
_BLOCK_COLUMNS = 32
# Of one slab of rows: numbers in fp32, their magnitudes, what is rounded, and the panels.
_SLAB_BYTES = 24 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """The weights of one module: `held_bytes` while the model runs, `stored_bytes` in the file."""

    path: str
    parameters: int
    held_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """All pieces, in the order of loading.

    `mlp_width` is the width of a token inside the feed-forward part, of all its experts together;
    `inner_widths` are those of its matrices; `group` is the columns that share a scale, 0 where
    numbers have none. `rounds`: products round activations too. `is_mixture`: a layer has experts.
    """

    pieces: tuple[Piece, ...]
    mlp_width: int
    inner_widths: tuple[int, ...]
    group: int
    rounds: bool
    is_mixture: bool

    @property
    def parameters(self) -> int:
        """Numbers, a tied head's once."""
        return sum(piece.parameters for piece in self.pieces)

    @property
    def held_bytes(self) -> int:
        """Resident while the model runs."""
        return sum(piece.held_bytes for piece in self.pieces)

    @property
    def loading_bytes(self) -> int:
        """The most that is resident while loading: what is done already, the module at hand, and
        the pages of its file.
        """
        done = most = 0
        for piece in self.pieces:
            done += piece.held_bytes
            most = max(most, done + piece.stored_bytes + _SLAB_BYTES)
        return most


def weigh(
    architecture: Architecture, config: ModelConfig, plan: WeightPlan, storage_of: StorageOf
) -> Weights:
    """The weights of a model of this shape under `plan`; `storage_of` gives the storage tag of the
    tensor of a name ("model.norm.weight") in the file.
    """
    with torch.device("meta"):
        model = architecture.build(config)
    pieces = tuple(_pieces(model, plan, storage_of))
    experts, inner = _widths(model)
    if plan.weights == "auto":
        layers = (piece for piece in pieces if layer_of(piece.path) is not None)
        tag = storage_of(f"{max(layers, key=lambda piece: piece.stored_bytes).path}.weight")
        if isinstance(tag, Quantized):
            group, rounds = tag.group, tag.rounds
        else:
            group, rounds = 0 if tag in _PLAIN else _BLOCK_COLUMNS, tag in _ROUNDING
    else:
        default = DEFAULT_GROUPS.get(plan.weights, 0)
        group, rounds = plan.group_size or default, plan.weights != "fp32"
    return Weights(
        pieces=pieces,
        mlp_width=max(config.hidden_size, experts, *inner),
        inner_widths=inner,
        group=group,
        rounds=rounds,
        is_mixture=experts > 0,
    )


def layer_of(path: str) -> int | None:
    """The number of the layer that a module belongs to; None for embedding, last norm and head."""
    return next((int(step) for step in path.split(".") if step.isdecimal()), None)


def _widths(model: CausalModel) -> tuple[int, tuple[int, ...]]:
    """The chosen experts' width together, and the different widths of feed-forward matrices."""
    together, inner = 0, set()
    for path, module in model.named_modules():
        if isinstance(module, SparseMoe):
            expert = module.experts.gate_proj.out_features
            together = max(together, module.experts_per_token * expert)
            inner.add(expert)
        elif isinstance(module, Linear) and module.in_features > 1 and module.out_features > 1:
            sides = {module.in_features, module.out_features} - {model.config.hidden_size}
            if "mlp" in path.split(".") and not path.endswith(".gate"):
                inner |= sides
    return together, tuple(sorted(inner))


def _pieces(model: CausalModel, plan: WeightPlan, storage_of: StorageOf) -> Iterator[Piece]:
    seen: set[int] = set()
    for path, module in model.named_modules():
        parameters = held = stored = 0
        for part, value in module.named_parameters(recurse=False):
            if id(value) in seen:
                continue
            seen.add(id(value))
            tag = storage_of(f"{path}.{part}")
            parameters += value.numel()
            stored += _stored_bytes(value, tag)
            if part == "weight" and isinstance(module, Linear | Embedding | GroupedLinear):
                held += _held_bytes(path, module, plan, tag)
            else:
                held += value.numel() * torch.float32.itemsize  # what native kernels compute in
        if parameters:
            yield Piece(path, parameters, held, stored)


def _stored_bytes(value: torch.Tensor, tag: str | Quantized) -> int:
    if isinstance(tag, Quantized):
        return tag.stored_bytes(value.numel() // value.shape[-1], value.shape[-1])
    if tag in _PLAIN:
        return value.numel() * _PLAIN[tag].itemsize
    return value.numel() // value.shape[-1] * BLOCK_LAYOUTS[tag].bytes_per_row(value.shape[-1])


def _held_bytes(path: str, module: nn.Module, plan: WeightPlan, tag: str | Quantized) -> int:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    rows, columns = weight.shape
    is_head = isinstance(module, Embedding) or path == "lm_head"
    kind = plan.rounded_to(path, columns, is_head=is_head)
    if kind in BITSANDBYTES_KINDS:
        name, _, double = kind.partition("-")
        whole = Quantized("llm.int8", 8, 8, 0)
        made = whole if name == "llm" else four_bits(name, nested=bool(double))
        return made.held_bytes(-(-rows // PANEL_ROWS) * PANEL_ROWS, columns)
    if kind is not None:
        return _rounded(kind, rows, columns, plan.group_size).size_bytes
    if isinstance(tag, Quantized):
        return tag.held_bytes(-(-rows // PANEL_ROWS) * PANEL_ROWS, columns)
    kept = pack(_as_stored(weight, tag))
    return kept.nbytes if isinstance(kept, torch.Tensor) else kept.size_bytes


def _as_stored(weight: torch.Tensor, tag: str) -> GgmlWeight | torch.Tensor:
    if tag in _PLAIN:
        return weight.detach().to(_PLAIN[tag])
    rows, columns = weight.shape
    width = BLOCK_LAYOUTS[tag].bytes_per_row(columns)
    return GgmlWeight(torch.empty((rows, width), dtype=torch.uint8, device="meta"), tag)


def _rounded(kind: str, rows: int, columns: int, group_size: int | None) -> PackedWeight:
    def empty(width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((rows, width), dtype=dtype, device="meta")

    if kind in ("bf16", "fp32"):
        tag, dtype = ("BF16", torch.bfloat16) if kind == "bf16" else ("F32", torch.float32)
        tensors = {"weight": empty(columns, dtype)}
    else:
        group = fitting_group(columns, group_size or DEFAULT_GROUPS[kind])
        tag = f"{kind.upper()}_G{group}"
        width = columns // 2 if kind == "int4" else columns
        scales = empty(columns // group, torch.float16)
        tensors = {"weight": empty(width, torch.uint8), "scales": scales}
    return PackedWeight.from_tensors(tensors, shape=(rows, columns), storage=tag)
