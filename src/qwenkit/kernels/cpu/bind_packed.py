"""The ops over packed matrices as Python functions."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch

from qwenkit.errors import KernelError
from qwenkit.kernels.cpu.library import Kernel, kernel, refuse
from qwenkit.kernels.cpu.memory import empty_rows
from qwenkit.kernels.ops.packed_experts import packed_experts
from qwenkit.kernels.ops.packed_gated import packed_gated
from qwenkit.kernels.ops.packed_matmul import packed_matmul
from qwenkit.kernels.ops.packed_projections import packed_projections
from qwenkit.kernels.packed import COLUMN_MULTIPLE, KINDS, PANEL_ROWS

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
        *((n, c_int64) for n in ("count", "tokens", "x_rows", "columns", "group", "kind")),
        *((n, c_int64) for n in ("zero_point", "parts", "gated", "threads")),
        ("epsilon", c_float),
    )


class _PackedRows(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("ids", "data", "scales", "mins", "y")),
        *((n, c_int64) for n in ("tokens", "rows", "columns", "group", "kind", "zero_point")),
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
        group = columns // scales[0].shape[1] if scales else columns
        done = self._call(
            PackedMatmulArguments(
                *map(_address, (x, norm, order, ends)),
                (PackedMatrix * MOST_MATRICES)(*matrices),
                *(len(matrices), tokens, len(x), columns, group, KINDS.index(factors.kind)),
                *(factors.zero_point, factors.parts, gated, torch.get_num_threads(), epsilon),
            )
        )
        if done == 3:
            raise KernelError(f"{self._op}: order or ends do not go with {len(x)} rows.")
        if done:
            raise KernelError(f"{self._op}: no memory for {tokens} rows of {columns} numbers.")
        return results


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
        sizes = ids.shape[0], rows, columns, group, KINDS.index(kind), zero_point
        if call(_PackedRows(*map(_address, (ids, data, scales, mins, y)), *sizes)):
            raise KernelError(f"packed_rows: ids must be from 0 to {rows - 1}.")
        return y

    return run


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_MOST_GROUP = 128  # columns to a scale
_BITS = {"int4": 4, "int8": 8, "bf16": 16, "fp32": 32}


def _check(
    first: torch.Tensor,
    packed: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    kind: str,
    rows: int,
    columns: int,
) -> None:
    """Raises KernelError unless every address that a kernel makes of these lies within them."""
    data, scales, mins = packed
    panels = -(-rows // PANEL_ROWS)
    fits = (
        first.is_cpu
        and data.is_cpu
        and data.is_contiguous()
        and columns % COLUMN_MULTIPLE[kind] == 0
        and data.shape == (panels, PANEL_ROWS * columns * _BITS[kind] // 8)
        and (scales is None) == (kind in ("bf16", "fp32"))
    )
    for values in (scales, mins):
        if values is not None:
            groups = values.shape[1]
            fits = (
                fits
                and values.is_contiguous()
                and values.dtype is torch.float16
                and values.shape == (panels, groups, PANEL_ROWS)
                and columns % (32 * groups) == 0
                and columns <= _MOST_GROUP * groups
            )
    if not fits:
        raise refuse(f"a packed {kind} matrix of {rows} × {columns}", first=first, data=data)
