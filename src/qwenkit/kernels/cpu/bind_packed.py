"""The ops over packed matrices as Python functions."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels.cpu.library import Kernel, kernel, refuse
from qwenkit.kernels.cpu.memory import empty_rows
from qwenkit.kernels.ops.packed_experts import packed_experts
from qwenkit.kernels.ops.packed_gated import packed_gated
from qwenkit.kernels.ops.packed_matmul import packed_matmul
from qwenkit.kernels.ops.packed_projections import packed_projections
from qwenkit.kernels.packed import FORMS, KINDS, PANEL_ROWS

MOST_MATRICES = 4


class PackedMatrix(ctypes.Structure):
    """As in packed_round.h: a matrix and what becomes of its product."""

    _fields_ = (
        *((n, c_void_p) for n in ("data", "scales", "mins", "bias", "residual", "y")),
        *((n, c_int64) for n in ("rows", "precise")),
    )


class PackedMatmulArguments(ctypes.Structure):
    """As in packed_round.h: matrices that are multiplied with the same tokens."""

    _fields_ = (
        *((n, c_void_p) for n in ("x", "norm", "order", "ends")),
        ("matrices", PackedMatrix * MOST_MATRICES),
        ("levels", c_void_p),
        *((n, c_int64) for n in ("count", "tokens", "x_rows", "columns", "group", "kind")),
        *((n, c_int64) for n in ("zero_point", "parts", "scale_groups", "scale_shift")),
        *((n, c_int64) for n in ("scale_bytes", "zeros", "gated", "threads")),
        *((n, c_float) for n in ("epsilon", "unit")),
    )


class _PackedRows(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("ids", "data", "scales", "mins", "levels", "y")),
        *((n, c_int64) for n in ("tokens", "rows", "columns", "group", "kind", "zero_point")),
        *((n, c_int64) for n in ("scale_bytes", "zeros")),
        ("unit", c_float),
    )


@dataclass(frozen=True, slots=True)
class Factors:
    """Matrices that share all but their rows. Lists are empty where no matrix has such a thing."""

    kind: str
    rows: Sequence[int]  # of each matrix, or of each of its parts
    zero_point: int
    data: Sequence[torch.Tensor]
    scales: Sequence[torch.Tensor] = ()
    mins: Sequence[torch.Tensor] = ()
    biases: Sequence[torch.Tensor] = ()
    precise: Sequence[bool] = ()
    parts: int = 1


class Multiply:
    """Calls the native product once its arguments are known to fit together."""

    def __init__(self, library: ctypes.CDLL, op: str) -> None:
        self._call = kernel(library, "qk_packed_matmul", PackedMatmulArguments)
        self._op = op

    def __call__(
        self,
        x: torch.Tensor,
        factors: Factors,
        *,
        norm: torch.Tensor | None = None,
        epsilon: float = 0.0,
        residual: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
        ends: torch.Tensor | None = None,
        gated: bool = False,
        into: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """x float32 [tokens, columns], of which `order` int64 chooses and repeats rows, to a tensor
        for each matrix; `gated` to one of two. `into` is memory for the result of one matrix, its
        residual's own perhaps. Raises KernelError for what does not fit.
        """
        x, columns = x.contiguous(), x.shape[1]
        tokens = len(x if order is None else order)
        scales, mins, biases = factors.scales, factors.mins, factors.biases
        matrices = []
        results = []
        for i, (data, rows) in enumerate(zip(factors.data, factors.rows, strict=True)):
            packed = data, scales[i] if scales else None, mins[i] if mins else None
            _check(x, packed, factors.kind, rows * factors.parts, columns)
            bias = biases[i].to(torch.float32).contiguous() if biases else None
            if (bias is not None and bias.shape != (rows,)) or (
                residual is not None and residual.shape != (tokens, rows)
            ):
                raise KernelError(
                    f"{self._op}: bias and residual must be [{rows}] and [{tokens}, {rows}]."
                )
            if not gated or i == 0:
                results.append(empty_rows(tokens, rows) if into is None else into)
            tensors = *packed, bias, residual, results[-1]
            precise = bool(factors.precise and factors.precise[i])
            matrices.append(PackedMatrix(*map(_address, tensors), rows, precise))
        for places, count in ((ends, factors.parts), (order, tokens)):
            if places is not None and not _are_places(places, count):
                raise refuse(self._op, x=x, places=places)
        if norm is not None and norm.shape != (columns,):
            raise refuse(self._op, x=x, norm=norm)
        steps, group, zero_point, *groups = self._kind(factors, columns)
        kind = KINDS[factors.kind]
        done = self._call(
            PackedMatmulArguments(
                *map(_address, (x, norm, order, ends)),
                (PackedMatrix * MOST_MATRICES)(*matrices),
                steps,
                *(len(matrices), tokens, len(x), columns, group, FORMS.index(kind.form)),
                *(zero_point, factors.parts, *groups),
                *(gated, torch.get_num_threads(), epsilon, kind.unit),
            )
        )
        if done == 3:
            raise KernelError(f"{self._op}: order or ends do not go with {len(x)} rows.")
        if done:
            raise KernelError(f"{self._op}: no memory for {tokens} rows of {columns} numbers.")
        return results

    def _kind(self, factors: Factors, columns: int) -> tuple[Any, ...]:
        """The address of levels, columns of a group of tokens, zero point, and of scales: groups,
        shift, bytes, and whether minimums are zero points. All matrices must be alike.
        """
        scales, mins, steps = factors.scales, factors.mins, _steps(factors.kind)
        given = scales[0] if scales else None
        if len({(t.dtype, t.shape[1]) for t in scales}) > 1 or len({t.dtype for t in mins}) > 1:
            raise KernelError(f"{self._op}: matrices of one call must have scales of one kind.")
        group, shift = _groups(KINDS[factors.kind].form, columns, given)
        zero_point = factors.zero_point if steps is None else _LEVEL_ZERO
        count = 0 if given is None else given.shape[1]
        return _address(steps), group, zero_point, count, shift, *_widths(given, mins)


def bind_packed_matmul(library: ctypes.CDLL) -> Kernel:
    multiply, reference = Multiply(library, "packed_matmul"), packed_matmul.reference
    float32 = torch.float32

    def run(
        x: torch.Tensor,
        data: torch.Tensor,
        scales: torch.Tensor | None,
        mins: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        kind: str,
        rows: int,
        zero_point: int,
        precise: bool,
    ) -> torch.Tensor:
        if not x.is_floating_point() or not x.numel() or not rows:
            given = data, scales, mins, bias, residual, kind, rows, zero_point, precise
            return reference(x, *given)  # type: ignore[no-any-return]
        factors = Factors(
            kind, (rows,), zero_point, (data,), _some(scales), _some(mins), _some(bias), (precise,)
        )
        if residual is not None:
            residual = residual.to(float32).contiguous()
        [y] = multiply(x.to(float32), factors, residual=residual)
        return y.to(x.dtype)

    return run


def bind_packed_projections(library: ctypes.CDLL) -> Kernel:
    multiply, reference = Multiply(library, "packed_projections"), packed_projections.reference

    def run(
        x: torch.Tensor,
        norm: torch.Tensor | None,
        epsilon: float,
        data: list[torch.Tensor],
        scales: list[torch.Tensor],
        mins: list[torch.Tensor],
        biases: list[torch.Tensor],
        kind: str,
        rows: list[int],
        zero_point: int,
        precise: list[bool],
    ) -> list[torch.Tensor]:
        if _unusual(x, norm) or len(data) > MOST_MATRICES:
            tensors = data, scales, mins, biases
            given = x, norm, epsilon, *tensors, kind, rows, zero_point, precise
            return reference(*given)  # type: ignore[no-any-return]
        factors = Factors(kind, rows, zero_point, data, scales, mins, biases, precise)
        return multiply(x, factors, norm=norm, epsilon=epsilon)

    return run


def bind_packed_gated(library: ctypes.CDLL) -> Kernel:
    multiply, reference = Multiply(library, "packed_gated"), packed_gated.reference

    def run(
        x: torch.Tensor,
        norm: torch.Tensor | None,
        epsilon: float,
        data: list[torch.Tensor],
        scales: list[torch.Tensor],
        mins: list[torch.Tensor],
        kind: str,
        rows: int,
        zero_point: int,
    ) -> torch.Tensor:
        if _unusual(x, norm):
            given = x, norm, epsilon, data, scales, mins, kind, rows, zero_point
            return reference(*given)  # type: ignore[no-any-return]
        factors = Factors(kind, (rows, rows), zero_point, data, scales, mins)
        [y] = multiply(x, factors, norm=norm, epsilon=epsilon, gated=True)
        return y

    return run


def bind_packed_experts(library: ctypes.CDLL) -> Kernel:
    multiply, reference = Multiply(library, "packed_experts"), packed_experts.reference

    def run(
        x: torch.Tensor,
        order: torch.Tensor | None,
        ends: torch.Tensor,
        data: list[torch.Tensor],
        scales: list[torch.Tensor],
        mins: list[torch.Tensor],
        kind: str,
        rows: int,
        zero_point: int,
    ) -> torch.Tensor:
        if _unusual(x, None) or (order is not None and not len(order)):
            given = x, order, ends, data, scales, mins, kind, rows, zero_point
            return reference(*given)  # type: ignore[no-any-return]
        if rows % PANEL_ROWS or len(data) > 2:
            raise KernelError(f"packed_experts: {len(data)} matrices of {rows} rows an expert.")
        each = len(data) * (rows,)
        factors = Factors(kind, each, zero_point, data, scales, mins, parts=len(ends))
        [y] = multiply(x, factors, order=order, ends=ends, gated=len(data) == 2)
        return y

    return run


def _are_places(places: torch.Tensor, count: int) -> bool:
    """Whether a kernel reads them right: [count] int64, one behind the other."""
    whole = places.dtype is torch.int64 and places.is_cpu and places.is_contiguous()
    return whole and places.shape == (count,)


def _unusual(x: torch.Tensor, norm: torch.Tensor | None) -> bool:
    """Whether the native product takes no such numbers."""
    given = x if norm is None else norm
    return not x.numel() or x.dtype is not torch.float32 or given.dtype is not torch.float32


def _some(tensor: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return () if tensor is None else (tensor,)


def bind_packed_rows(library: ctypes.CDLL) -> Kernel:
    call = kernel(library, "qk_packed_rows", _PackedRows)

    def run(
        ids: torch.Tensor,
        data: torch.Tensor,
        scales: torch.Tensor | None,
        mins: torch.Tensor | None,
        kind: str,
        rows: int,
        columns: int,
        zero_point: int,
    ) -> torch.Tensor:
        if ids.dtype is not torch.int64 or ids.dim() != 1:
            raise refuse("packed_rows", ids=ids, data=data)
        _check(ids, (data, scales, mins), kind, rows, columns)
        ids = ids.contiguous()
        y = torch.empty((ids.shape[0], columns), dtype=torch.float32)
        group = columns if scales is None else columns // scales.shape[1]
        levels = _levels(kind)
        tensors = ids, data, scales, mins, levels, y
        sizes = ids.shape[0], rows, columns, group, FORMS.index(KINDS[kind].form), zero_point
        unit = KINDS[kind].unit if levels is None else 1.0
        widths = _widths(scales, () if mins is None else (mins,))
        if call(_PackedRows(*map(_address, tensors), *sizes, *widths, unit)):
            raise KernelError(f"packed_rows: ids must be from 0 to {rows - 1}.")
        return y

    return run


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_GROUPS = (128, 64, 32)  # columns by which tokens are rounded
_LEVEL_ZERO = 128  # added to levels, so that none is negative


@cache
def _steps(kind: str) -> torch.Tensor | None:
    """The levels of a kind as the products read them, uint8 [16]."""
    steps = KINDS[kind].steps
    return None if steps is None else torch.tensor([s + _LEVEL_ZERO for s in steps]).byte()


@cache
def _levels(kind: str) -> torch.Tensor | None:
    """The levels of a kind, fp32 [16]."""
    levels = KINDS[kind].levels
    return None if levels is None else torch.tensor(levels)


def _groups(form: str, columns: int, scales: torch.Tensor | None) -> tuple[int, int]:
    """Columns by which tokens are rounded, and by how many bits the number of such a group is to be
    shifted for the number of its scale. Of fp8, whose tokens are not rounded, a scale's columns.
    """
    if scales is None or form == "fp8":
        return columns if scales is None else columns // scales.shape[1], 0
    shared = columns // scales.shape[1]
    group = next((size for size in _GROUPS if shared % size == 0), 0)
    if not group:
        return 0, 0
    return group, _ONE_SCALE if shared == columns else (shared // group).bit_length() - 1


_ONE_SCALE = 62  # of a row: no group has a number so high


def _widths(scales: torch.Tensor | None, mins: Sequence[torch.Tensor]) -> tuple[int, bool]:
    """Bytes of a scale, and whether minimums are zero points."""
    return 0 if scales is None else scales.itemsize, bool(mins) and mins[0].dtype is torch.uint8


def _check(
    first: torch.Tensor,
    packed: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    kind: str,
    rows: int,
    columns: int,
) -> None:
    """Raises KernelError unless every address that a kernel makes of these lies within them."""
    data, scales, mins = packed
    panels, known = -(-rows // PANEL_ROWS), KINDS[kind]
    fits = (
        first.is_cpu
        and data.is_cpu
        and data.is_contiguous()
        and columns % known.multiple == 0
        and data.shape == (panels, PANEL_ROWS * columns * known.bits // 8)
        and (scales is None) == (known.form in ("bf16", "fp32"))
        and (mins is None or (known.form in ("int4", "int8") and known.levels is None))
    )
    for values in (scales, mins):
        if fits and values is not None and scales is not None:
            groups = scales.shape[1]
            fits = (
                values.is_contiguous()
                and values.shape == (panels, groups, PANEL_ROWS)
                and scales.dtype in (torch.float16, torch.float32)
                and (values.dtype is scales.dtype or (values is mins and _widths(None, [mins])[1]))
                and groups > 0
                and columns % groups == 0
                and _scales_fit(known.form, columns, scales)
            )
    if not fits:
        raise refuse(f"a packed {kind} matrix of {rows} × {columns}", first=first, data=data)


def _scales_fit(form: str, columns: int, scales: torch.Tensor) -> bool:
    """Whether groups of tokens fall into those of the scales."""
    shared = columns // scales.shape[1]
    if form == "fp8":
        return shared % 4 == 0
    group, shift = _groups(form, columns, scales)
    return group > 0 and (shift == _ONE_SCALE or group << shift == shared)
