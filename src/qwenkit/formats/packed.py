"""Weights in the form that the native products read: panels of sixteen rows.

Every stored form that has panels is repacked by moving bytes, so `to_tensors` gives back exactly
what was stored; a format says how by `to_packed` and `way_back`. Plain bf16 and fp32 are known
here, as is what `round_to_nearest` makes of any numbers: rows of kept numbers beside their scales,
under tags such as INT4_G32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Self

import torch

from qwenkit.errors import CheckpointError, NonFiniteError, UsageError, suggest
from qwenkit.formats.ggml_panels import PACKED_BLOCKS
from qwenkit.kernels.finite import is_finite
from qwenkit.kernels.ops.packed_experts import packed_experts
from qwenkit.kernels.ops.packed_gated import packed_gated
from qwenkit.kernels.ops.packed_matmul import packed_matmul
from qwenkit.kernels.ops.packed_projections import packed_projections
from qwenkit.kernels.ops.packed_rows import packed_rows
from qwenkit.kernels.ops.rms_norm import rms_norm
from qwenkit.kernels.ops.take_columns import take_columns
from qwenkit.kernels.packed import (
    KINDS,
    PANEL_ROWS,
    Packed,
    deinterleave,
    deinterleave_groups,
    interleave,
    interleave_groups,
    nibbles_from_numbers,
    select_rows,
    unpack,
)
from qwenkit.layers.weight import QuantWeight, WayBack

GROUP_SIZES = (128, 64, 32)
ROUNDED_KINDS = ("int4", "int8", "bf16", "fp32")

_PLAIN = {"BF16": ("bf16", torch.bfloat16), "F32": ("fp32", torch.float32)}
_ROUNDED = {
    f"{kind.upper()}_G{group}": (kind, group) for kind in ("int4", "int8") for group in GROUP_SIZES
}
_BUFFERS = ("data", "scales", "mins", "order")


class PackedWeight(QuantWeight):
    """A matrix in panels; `storage` says what `to_tensors` makes of it. Never written to."""

    data: torch.Tensor
    scales: torch.Tensor | None
    mins: torch.Tensor | None
    order: torch.Tensor | None

    precise = False  # more of the activations are rounded to fifteen bits instead of eight

    def __init__(self, packed: Packed, way_back: WayBack) -> None:
        super().__init__()
        self.shape = (packed.rows, packed.columns)
        self.kind, self.zero_point = packed.kind, packed.zero_point
        for name in _BUFFERS:
            self.register_buffer(name, getattr(packed, name))
        self._aside = {name: f"aside_{name}" for name in way_back.aside}
        for name, buffer in self._aside.items():
            self.register_buffer(buffer, way_back.aside[name])
        self._way_back = replace(way_back, aside={})
        self.order_bytes = _bytes_of(packed.order)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], *, shape: tuple[int, int], storage: str
    ) -> Self:
        """Repack what `to_tensors` gave for a tag of this file or of GGML: "weight" as blocks, as
        plain numbers, or as row form with "scales". Raises CheckpointError for another tag or
        shape.
        """
        rows, columns = shape
        stored = tensors["weight"]
        if storage in _PLAIN:
            kind, dtype = _PLAIN[storage]
            _expect(storage, stored, dtype, shape)
            packed = Packed(kind, rows, columns, interleave(_bytes(stored)))
        elif storage in _ROUNDED:
            kind, group = _ROUNDED[storage]
            _expect(storage, stored, torch.uint8, (rows, columns // (2 if kind == "int4" else 1)))
            _expect(storage, tensors["scales"], torch.float16, (rows, columns // group))
            scales = interleave_groups(tensors["scales"])
            packed = Packed(kind, rows, columns, interleave(stored), scales, None, _middle(kind))
        elif storage in PACKED_BLOCKS:
            block = PACKED_BLOCKS[storage]
            _expect(storage, stored, torch.uint8, (rows, block.row_bytes(columns)))
            packed = block.pack(stored, shape)
        else:
            known = [*PACKED_BLOCKS, *_PLAIN, *_ROUNDED]
            raise CheckpointError(f"{storage} tensor", "weight", suggest(storage, known))
        return cls(packed, WayBack(storage, partial(_restore, storage)))

    @classmethod
    def round_to_nearest(
        cls, weight: torch.Tensor, kind: str, *, group_size: int | None = None
    ) -> Self:
        """Of float [rows, columns]. `group_size` columns share a scale; where it does not divide,
        the largest smaller one of 128, 64, 32 that does is taken. Default: 32 for int4, 128 for
        int8.

        Raises UsageError for another kind or size, or columns that none of them divides;
        NonFiniteError when a number is NaN, infinite or too large for its scale.
        """
        rows, columns = weight.shape
        if kind not in ROUNDED_KINDS:
            raise UsageError(f"weights: got {kind!r}. {suggest(kind, ROUNDED_KINDS)}")
        if columns % KINDS[kind].multiple:
            raise UsageError(f"weights {kind}: {columns} columns are no multiple of 32.")
        if not is_finite(weight):
            raise NonFiniteError("the weight has NaN or infinite numbers; fetch the file again.")
        if kind in ("bf16", "fp32"):
            tag = "BF16" if kind == "bf16" else "F32"
            plain = weight.to(_PLAIN[tag][1])
            return cls.from_tensors({"weight": plain}, shape=(rows, columns), storage=tag)
        group = fitting_group(columns, group_size or (32 if kind == "int4" else 128))
        grouped = weight.to(torch.float32).view(rows, columns // group, group)
        at = grouped.abs().argmax(2, keepdim=True)  # [rows, groups, 1]
        most = grouped.gather(2, at)
        # Of int4 the number of largest magnitude gets the one level that has no opposite.
        scales = (most / -8 if kind == "int4" else most.abs() / 127).to(torch.float16)
        if not bool(torch.isfinite(scales).all()):
            raise NonFiniteError("the weight has numbers too large for a scale in fp16.")
        inverse = torch.where(scales == 0, 0.0, 1.0 / scales.to(torch.float32))
        middle = _middle(kind)
        kept = (grouped * inverse).round_().add_(middle).clamp_(0, 2 * middle - 1)
        numbers = kept.to(torch.uint8).view(rows, columns)
        row_form = nibbles_from_numbers(numbers) if kind == "int4" else numbers
        tensors = {"weight": row_form, "scales": scales[:, :, 0]}
        storage = f"{kind.upper()}_G{group}"
        return cls.from_tensors(tensors, shape=(rows, columns), storage=storage)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        way_back = self.way_back()
        return way_back.restore(self.packed, way_back.aside)

    def way_back(self) -> WayBack:
        aside = {name: getattr(self, buffer) for name, buffer in self._aside.items()}
        return replace(self._way_back, aside=aside)

    @property
    def storage(self) -> str:
        return self._way_back.storage

    @property
    def packed(self) -> Packed:
        """The matrix as the ops take it, but for the order of its columns."""
        rows, columns = self.shape
        groups = self.scales, self.mins
        return Packed(self.kind, rows, columns, self.data, *groups, self.zero_point, self.order)

    def to_packed(self) -> Packed:
        return self.packed

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return unpack(self.packed, dtype)  # [rows, columns]

    def select_rows(self, index: torch.Tensor) -> Self:
        return self._of(select_rows(self.packed, index))

    def row_range(self, start: int, stop: int) -> Self:
        if start % PANEL_ROWS or (stop % PANEL_ROWS and stop != self.shape[0]):
            return super().row_range(start, stop)
        panels = slice(start // PANEL_ROWS, -(-stop // PANEL_ROWS))
        groups = [None if t is None else t[panels] for t in (self.scales, self.mins)]
        few = replace(self.packed, rows=stop - start, data=self.data[panels])
        return self._of(replace(few, scales=groups[0], mins=groups[1]))

    def _of(self, packed: Packed) -> Self:
        return type(self)(packed, self._way_back.of_rows or self.way_back())

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        tensors = self.data, self.scales, self.mins
        numbers: torch.Tensor = packed_rows(
            ids, *tensors, self.kind, *self.shape, self.zero_point
        )  # [tokens, columns]
        if self.order is not None:
            numbers = numbers[:, self.order.long().argsort()]
        return numbers.to(dtype)

    def matmul(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return super().matmul(x, bias, residual)
        rows, columns = self.shape
        y: torch.Tensor = packed_matmul(
            self._ordered(x.reshape(-1, columns)),
            self.data,
            self.scales,
            self.mins,
            bias,
            None if residual is None else residual.reshape(-1, rows),
            self.kind,
            rows,
            self.zero_point,
            self.precise,
        )
        return y.view(*x.shape[:-1], rows)

    def project(
        self,
        x: torch.Tensor,
        weights: Sequence[QuantWeight],
        biases: Sequence[torch.Tensor | None],
        norm: torch.Tensor | None,
        epsilon: float,
    ) -> list[torch.Tensor] | None:
        packed = self._alike(x, weights, norm)
        bias = [each for each in biases if each is not None]
        if packed is None or len(bias) not in (0, len(weights)):
            return None
        results: list[torch.Tensor] = packed_projections(
            *self._normal(x, norm, epsilon),
            *_lists(packed),
            bias,
            self.kind,
            [weight.shape[0] for weight in packed],
            self.zero_point,
            [weight.precise for weight in packed],
        )
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in results]

    def gated(
        self, x: torch.Tensor, up: QuantWeight, norm: torch.Tensor | None, epsilon: float
    ) -> torch.Tensor | None:
        packed = self._alike(x, (self, up), norm)
        if packed is None or self.shape != up.shape or self.precise or packed[1].precise:
            return None
        rows = self.shape[0]
        how = self.kind, rows, self.zero_point
        y: torch.Tensor = packed_gated(*self._normal(x, norm, epsilon), *_lists(packed), *how)
        return y.view(*x.shape[:-1], rows)

    def _ordered(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, columns] with its columns in the order of the panels'."""
        if self.order is None:
            return x
        taken: torch.Tensor = take_columns(x, self.order)
        return taken

    def _normal(
        self, x: torch.Tensor, norm: torch.Tensor | None, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor | None, float]:
        """What products of several matrices take: x as [tokens, columns], and how it is normalised,
        which comes before columns are put in another order.
        """
        x = x.reshape(-1, self.shape[1])
        if self.order is None:
            return x, norm, epsilon
        return self._ordered(x if norm is None else rms_norm(x, norm, epsilon)), None, 0.0

    def _alike(
        self, x: torch.Tensor, weights: Sequence[QuantWeight], norm: torch.Tensor | None
    ) -> list[PackedWeight] | None:
        """The weights if they can be multiplied with x in one call: all in one kind of panels."""
        alike = [w for w in weights if isinstance(w, PackedWeight) and _are_alike(w, self)]
        numbers = x.dtype is torch.float32 and (norm is None or norm.dtype is torch.float32)
        plain = not (x.requires_grad and torch.is_grad_enabled())
        return alike if len(alike) == len(weights) and numbers and plain else None

    def grouped_matmul(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        rows = self.shape[0] // ends.numel()
        if rows % PANEL_ROWS or (x.requires_grad and torch.is_grad_enabled()):
            return super().grouped_matmul(x, ends)
        how = self.kind, rows, self.zero_point
        y: torch.Tensor = packed_experts(self._ordered(x), None, ends, *_lists([self]), *how)
        return y  # [rows of x, rows]

    def grouped_gated(
        self, x: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, up: QuantWeight
    ) -> torch.Tensor | None:
        packed = self._alike(x, (self, up), None)
        rows = self.shape[0] // ends.numel()
        if packed is None or self.shape != up.shape or rows % PANEL_ROWS:
            return None
        how = self.kind, rows, self.zero_point
        x = self._ordered(x)
        y: torch.Tensor = packed_experts(x, order, ends, *_lists(packed), *how)
        return y  # [choices, rows]

    def extra_repr(self) -> str:
        return f"{self.shape[0]} × {self.shape[1]}, {self._way_back.storage}, packed"


def _lists(weights: Sequence[PackedWeight]) -> tuple[list[torch.Tensor], ...]:
    """Data, scales and minimums as the ops of several matrices take them."""
    return (
        [weight.data for weight in weights],
        [weight.scales for weight in weights if weight.scales is not None],
        [weight.mins for weight in weights if weight.mins is not None],
    )


def fitting_group(columns: int, wanted: int) -> int:
    """The largest of 128, 64, 32 that is at most `wanted` and divides `columns`.

    Raises UsageError for another size, or when none divides.
    """
    if wanted not in GROUP_SIZES:
        raise UsageError(f"group_size: got {wanted}; choose one of 32, 64 and 128.")
    for group in GROUP_SIZES:
        if group <= wanted and columns % group == 0:
            return group
    raise UsageError(f"weights: rows of {columns} numbers are no multiple of 32.")


def pack(weight: QuantWeight | torch.Tensor) -> QuantWeight | torch.Tensor:
    """The same numbers in panels; what has no packed form comes back as it is."""
    if isinstance(weight, QuantWeight):
        packed = None if isinstance(weight, PackedWeight) else weight.to_packed()
        return weight if packed is None else PackedWeight(packed, weight.way_back())
    if weight.dim() == 2:
        tag = "BF16" if weight.dtype == torch.bfloat16 else "F32"
        kind, dtype = _PLAIN[tag]
        rows, columns = weight.shape
        if columns % KINDS[kind].multiple == 0:
            plain = weight.detach().to(dtype)  # fp16 is not fast anywhere, and bf16 would lose bits
            return PackedWeight.from_tensors({"weight": plain}, shape=(rows, columns), storage=tag)
    return weight


def _restore(
    storage: str, packed: Packed, aside: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The inverse of `PackedWeight.from_tensors`."""
    if storage in PACKED_BLOCKS:
        return {"weight": PACKED_BLOCKS[storage].unpack(packed)}
    kept = deinterleave(packed.data, packed.rows)
    if storage in _PLAIN:
        return {"weight": kept.view(_PLAIN[storage][1])}
    assert packed.scales is not None
    scales = deinterleave_groups(packed.scales, packed.rows)  # [rows, groups]
    return {"weight": kept, "scales": scales.contiguous()}


def _are_alike(one: PackedWeight, other: PackedWeight) -> bool:
    """Whether both may be multiplied in one call."""
    return (
        (one.kind, one.zero_point) == (other.kind, other.zero_point)
        and one.packed.group == other.packed.group
        and _dtypes(one) == _dtypes(other)
        and one.order_bytes == other.order_bytes
    )


def _dtypes(weight: PackedWeight) -> tuple[torch.dtype | None, ...]:
    return tuple(None if t is None else t.dtype for t in (weight.scales, weight.mins))


def _bytes_of(order: torch.Tensor | None) -> bytes | None:
    """To compare orders by where no operator of torch may run, as in a step that is recorded."""
    if order is None or order.is_meta:
        return None
    return order.cpu().numpy().tobytes()


def _middle(kind: str) -> int:
    return 8 if kind == "int4" else 128


def _bytes(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.contiguous().view(torch.uint8)


def _expect(storage: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{storage} tensor",
            "weight",
            f"got {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}.",
        )
