"""What the weights of a model become when it is loaded to run on native kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from qwenkit.errors import NonFiniteError, UsageError, suggest
from qwenkit.formats.bnb4 import Bnb4Weight
from qwenkit.formats.llm_int8 import LlmInt8Weight
from qwenkit.formats.packed import GROUP_SIZES, ROUNDED_KINDS, PackedWeight, pack
from qwenkit.kernels.cpu.memory import empty_weight
from qwenkit.kernels.finite import is_finite
from qwenkit.kernels.packed import PANEL_ROWS
from qwenkit.layers.weight import QuantWeight

# What bitsandbytes makes while loading: embedding, head and routers stay as they are stored.
BITSANDBYTES_KINDS = ("nf4", "nf4-double", "fp4", "fp4-double", "llm-int8")
WEIGHT_KINDS = (*ROUNDED_KINDS, *BITSANDBYTES_KINDS)
WEIGHTS = ("auto", *WEIGHT_KINDS)
_KEPT = (".gate", ".shared_expert_gate")  # routers: small, and a wrong expert costs most
# The head chooses between tokens that may be close, and a third of the error that eight bits leave
# in the logits was measured to come through the values, which are a few rows only.
_PRECISE = (".v_proj",)
_SLAB_NUMBERS = 1 << 20  # rounded at a time: 4 MB in fp32, and a few times that on the way


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """`weights` "auto" packs what is stored, as it is; another kind rounds every matrix to nearest.

    `group_size` columns share a scale (None: the kind's default). `head` is the kind of embedding
    and head; None: int8 for int4, as stored for bitsandbytes' kinds, else that of the rest. Raises
    UsageError for anything unknown.
    """

    weights: str = "auto"
    group_size: int | None = None
    head: str | None = None

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise UsageError(f"weights: got {self.weights!r}. {suggest(self.weights, WEIGHTS)}")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise UsageError(f"group_size: got {self.group_size}; choose one of 32, 64 and 128.")
        if self.group_size is not None and self.weights not in ("int4", "int8"):
            raise UsageError("group_size: only weights int4 and int8 have groups.")
        if self.head is not None and self.head not in ROUNDED_KINDS:
            raise UsageError(
                f"head_weights: got {self.head!r}. {suggest(self.head, ROUNDED_KINDS)}"
            )
        if self.head is not None and self.weights == "auto":
            raise UsageError("head_weights: needs weights to be something else than auto as well.")

    def apply(
        self, path: str, weight: QuantWeight | torch.Tensor, *, is_head: bool
    ) -> QuantWeight | torch.Tensor:
        """The weight to run with, of the module at `path`. A head's is made precise: where the best
        two tokens are close, eight bits would choose between them by chance.

        Raises NonFiniteError naming the weight when it is not finite.
        """
        made = self._make(path, weight, is_head)
        if isinstance(made, PackedWeight):
            made.precise = is_head or path.endswith(_PRECISE)
        return made

    def _make(
        self, path: str, weight: QuantWeight | torch.Tensor, is_head: bool
    ) -> QuantWeight | torch.Tensor:
        try:
            kind = self.rounded_to(path, weight.shape[1], is_head=is_head)
            if kind in BITSANDBYTES_KINDS:
                weight, kind = _quantized(weight, kind), None
            return self._packed(weight, kind)
        except NonFiniteError as error:
            raise NonFiniteError(f"{path}.weight: {error}") from error

    def _packed(
        self, weight: QuantWeight | torch.Tensor, kind: str | None
    ) -> QuantWeight | torch.Tensor:
        group_size = self.group_size if kind in ("int4", "int8") else None

        def part(start: int, stop: int) -> QuantWeight | torch.Tensor:
            if isinstance(weight, torch.Tensor):
                some: QuantWeight | torch.Tensor = weight.detach()[start:stop]
            else:
                some = weight.row_range(start, stop)
            if kind is None:
                made = pack(some)
                check_finite(some if isinstance(some, torch.Tensor) else made)  # while it is near
                return made
            numbers = some.dequantize(torch.float32) if isinstance(some, QuantWeight) else some
            return PackedWeight.round_to_nearest(numbers, kind, group_size=group_size)

        packed = _in_slabs(weight.shape[0], weight.shape[1], part)
        if packed is None:  # not looked at slab by slab
            check_finite(weight)
            return weight
        if kind is None and isinstance(weight, QuantWeight):
            return PackedWeight(packed.packed, weight.way_back())  # of all rows
        return packed

    def rounded_to(self, path: str, columns: int, *, is_head: bool) -> str | None:
        """The kind that the matrix at `path` is rounded to; None: it is packed as it is stored."""
        if self.weights == "auto" or path.endswith(_KEPT) or columns % 32:
            return None
        if is_head and self.weights in BITSANDBYTES_KINDS:
            return self.head
        if is_head:
            return self.head or ("int8" if self.weights == "int4" else self.weights)
        return self.weights


def _quantized(weight: QuantWeight | torch.Tensor, kind: str) -> QuantWeight:
    """A matrix in a format of bitsandbytes."""
    whole = weight.dequantize(torch.float32) if isinstance(weight, QuantWeight) else weight
    if kind == "llm-int8":
        return LlmInt8Weight.quantize(whole)
    name, _, double = kind.partition("-")
    return Bnb4Weight.quantize(whole, name, nested=bool(double))


def check_finite(weight: QuantWeight | torch.Tensor) -> None:
    """Raises NonFiniteError when a number of a weight, or of any plain tensor, is not finite."""
    if isinstance(weight, QuantWeight):
        weight.check_finite()
    elif not is_finite(weight):
        kind = str(weight.dtype).removeprefix("torch.")
        raise NonFiniteError(f"some numbers are NaN or infinite in {kind}; fetch the file again.")


def _in_slabs(
    rows: int, columns: int, make: Callable[[int, int], QuantWeight | torch.Tensor]
) -> PackedWeight | None:
    """A matrix of which `make` gives the rows from one to another, some panels at a time: what is
    needed on the way is never as large as the matrix. None where `make` packs nothing.
    """
    step = max(1, _SLAB_NUMBERS // columns // PANEL_ROWS) * PANEL_ROWS
    if rows <= step:
        return _settled(make(0, rows))
    part = make(0, PANEL_ROWS)
    if not isinstance(part, PackedWeight):
        return None
    # Taken before any slab is: what a slab needs is then free again behind it, not a hole before.
    panels = -(-rows // PANEL_ROWS)
    whole: dict[str, Any] = {n: _place(t, panels) for n, t in _panels(part)}
    for start in range(0, rows, step):
        slab = make(start, min(rows, start + step))
        assert isinstance(slab, PackedWeight)
        if {n for n, _ in _panels(slab)} != whole.keys() or slab.zero_point != part.zero_point:
            return _settled(make(0, rows))  # only some of the rows have zero points of their own
        for name, tensor in _panels(slab):
            whole[name][start // PANEL_ROWS :][: len(tensor)] = tensor
    return PackedWeight(replace(part.packed, rows=rows, **whole), part.way_back())


def _settled(made: QuantWeight | torch.Tensor) -> PackedWeight | None:
    """A packed weight in the memory that weights are kept in; None of anything else."""
    if not isinstance(made, PackedWeight):
        return None
    whole: dict[str, Any] = {n: _place(t, len(t)) for n, t in _panels(made)}
    for name, tensor in _panels(made):
        whole[name].copy_(tensor)
    return PackedWeight(replace(made.packed, **whole), made.way_back())


def _place(like: torch.Tensor, panels: int) -> torch.Tensor:
    """Where so many panels are kept, on the device that they are on."""
    shape = panels, *like.shape[1:]
    return empty_weight(shape, like.dtype) if like.is_cpu else like.new_empty(shape)


def _panels(weight: PackedWeight) -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("data", "scales", "mins"):
        tensor = getattr(weight, name)
        if tensor is not None:
            yield name, tensor


def put(module: torch.nn.Module, weight: QuantWeight | torch.Tensor) -> None:
    """Make it the module's weight."""
    if isinstance(weight, QuantWeight):
        del module.weight
        module.weight = weight
    else:
        module.weight = cast(torch.nn.Parameter, weight)
