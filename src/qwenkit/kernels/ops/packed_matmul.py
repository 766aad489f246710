"""Activations times a transposed packed matrix, with what is added to the product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qwenkit.kernels.packed import (
    KINDS,
    Packed,
    interleave,
    interleave_groups,
    nibbles_from_numbers,
    unpack,
)
from qwenkit.kernels.registry import Arguments, Op


def _reference(
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
    """x [tokens, columns] to x Wᵀ + bias + residual, [tokens, rows], in x's dtype.

    W is the matrix that `kernels.packed.Packed` describes; `bias` is [rows], `residual`
    [tokens, rows]. Multiplies in fp32; a backend may round activations for int4 and int8 to eight
    bits, and to fifteen where they stand out of their token, more of them when `precise`.
    """
    if not x.shape[0]:  # a chunk of a prompt that samples nothing: the head stays packed
        return x.new_empty((0, rows))
    packed = Packed(kind, rows, x.shape[1], data, scales, mins, zero_point)
    y = x.to(torch.float32) @ unpack(packed, torch.float32).T  # [tokens, rows]
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    return y.to(x.dtype)


def _shape(
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
    return x.new_empty((x.shape[0], rows))


@dataclass(frozen=True, slots=True)
class Setting:
    """What a packed matrix may be. `group` columns share a scale, 0: all of a row. `offsets` are
    "none", "mins" or "zeros", minimums or zero points of each group; `wide` scales are fp32.
    """

    kind: str
    group: int = 0
    offsets: str = "none"
    wide: bool = False

    def columns(self, groups: int) -> int:
        """Columns of a matrix with so many groups, or pieces of some length where it has none."""
        return groups * (self.group or KINDS[self.kind].multiple * (17 if self._is_plain else 3))

    @property
    def _is_plain(self) -> bool:
        return KINDS[self.kind].form in ("bf16", "fp32")

    def matrix(self, rows: int, columns: int, generator: torch.Generator) -> Packed:
        """A random packed matrix for tests and benchmarks."""
        kind = KINDS[self.kind]
        if self._is_plain:
            dtype = torch.bfloat16 if kind.form == "bf16" else torch.float32
            numbers = (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)
            return Packed(self.kind, rows, columns, interleave(numbers.view(torch.uint8)))
        most = 1 << kind.bits
        kept = torch.randint(0, most, (rows, columns), dtype=torch.uint8, generator=generator)
        if kind.form == "fp8":
            kept[kept & 127 == 127] = 0  # no NaN
        row_form = nibbles_from_numbers(kept) if kind.bits == 4 else kept
        groups = columns // (self.group or columns)
        # As large as the kept numbers are small, so that all kinds have numbers alike.
        size = 0.04 / max(kind.levels or (448 if kind.form == "fp8" else most * kind.unit,))
        scales, lows = torch.rand(2, rows, groups, generator=generator) * size
        dtype = torch.float32 if self.wide else torch.float16
        mins, middle = None, most // 2
        if self.offsets == "mins":
            mins, middle = interleave_groups((-8 * lows).to(dtype)), 0
        elif self.offsets == "zeros":
            zeros = (lows / size * most).to(torch.uint8)
            mins, middle = interleave_groups(zeros), 0
        elif kind.levels is not None or kind.form == "fp8":
            middle = 0
        data, scales = interleave(row_form), interleave_groups(scales.to(dtype))
        return Packed(self.kind, rows, columns, data, scales, mins, middle)


PACKED_SETTINGS = (
    Setting("int4", 32),
    Setting("int4", 64, wide=True),
    Setting("int4", 128),
    Setting("int4", 256, "zeros"),
    Setting("int4", 32, "mins"),
    Setting("int8", 32),
    Setting("int8", 128),
    Setting("int8", 0, "zeros", wide=True),
    Setting("llm_int8", 0, wide=True),
    Setting("nf4", 64, wide=True),
    Setting("fp4", 128),
    Setting("iq4_nl", 32),
    Setting("fp8", 128, wide=True),
    Setting("fp8", 0, wide=True),
    Setting("bf16"),
    Setting("fp32"),
)


def _arguments(
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    precise: bool = False,
) -> Arguments:
    tensors = packed.data, packed.scales, packed.mins, bias, residual
    return x, *tensors, packed.kind, packed.rows, packed.zero_point, precise


def _cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for setting in PACKED_SETTINGS:
        sizes = ((1, 1, 1), (1, 37, 3), (2, 16, 5), (7, 50, 2), (13, 33, 1), (33, 64, 3))
        for tokens, rows, groups in sizes:
            columns = setting.columns(groups)
            matrix = setting.matrix(rows, columns, generator)
            first = unpack(matrix, torch.float32)[:1]
            # Close to one row, so that outputs do not cancel and an error has something to be
            # relative to.
            x = torch.randn(tokens, columns, generator=generator) + first / first.std()
            yield _arguments(x, matrix)
            bias = torch.randn(rows, generator=generator)
            residual = torch.randn(tokens, rows, generator=generator)
            yield _arguments(x, matrix, bias)
            yield _arguments(x, matrix, bias, residual)
            outliers = x.clone()
            outliers[:, first.abs().argmax()] = 1e4  # of Qwen's size
            yield _arguments(outliers, matrix)
            yield _arguments(outliers, matrix, precise=True)
        yield _arguments(torch.zeros_like(x), matrix)
        yield _arguments(x * 1e-35, matrix, bias)
        yield _arguments(x.to(torch.bfloat16), matrix)
        yield _arguments(x[:0], matrix)


packed_matmul = Op(
    name="packed_matmul",
    schema="(Tensor x, Tensor data, Tensor? scales, Tensor? mins, Tensor? bias, Tensor? residual, "
    "str kind, int rows, int zero_point, bool precise) -> Tensor",
    reference=_reference,
    shape=_shape,
    cases=_cases,
    tolerance=2e-2,  # a backend may round activations to eight bits per group of columns
)
