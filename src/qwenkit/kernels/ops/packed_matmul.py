"""Activations times a transposed packed matrix, with what is added to the product."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.kernels.packed import (
    COLUMN_MULTIPLE,
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
    bits, and, when `precise` says so, no further than to fifteen.
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


# Kind, columns to a scale, with minimums: what cases are made of.
PACKED_SETTINGS = (
    ("int4", 32, False),
    ("int4", 64, False),
    ("int4", 128, False),
    ("int4", 32, True),
    ("int8", 32, False),
    ("int8", 128, False),
    ("bf16", 2, False),
    ("fp32", 1, False),
)


def example_matrix(
    kind: str,
    rows: int,
    columns: int,
    generator: torch.Generator,
    *,
    group: int = 32,
    mins: bool = False,
) -> Packed:
    """A random packed matrix for tests and benchmarks."""
    if kind in ("bf16", "fp32"):
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        numbers = (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)
        return Packed(kind, rows, columns, interleave(numbers.view(torch.uint8)))
    most = 16 if kind == "int4" else 256
    kept = torch.randint(0, most, (rows, columns), dtype=torch.uint8, generator=generator)
    row_form = nibbles_from_numbers(kept) if kind == "int4" else kept
    scales, lows = torch.rand(2, rows, columns // group, generator=generator) * 0.04 / most
    return Packed(
        kind,
        rows,
        columns,
        interleave(row_form),
        interleave_groups(scales.to(torch.float16)),
        interleave_groups((-8 * lows).to(torch.float16)) if mins else None,
        0 if mins else most // 2,
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
    for kind, group, mins in PACKED_SETTINGS:
        sizes = ((1, 1, 1), (1, 37, 3), (2, 16, 5), (7, 50, 2), (13, 33, 1), (33, 64, 3))
        for tokens, rows, groups in sizes:
            columns = groups * max(group, COLUMN_MULTIPLE[kind] * 17 if group < 32 else group)
            matrix = example_matrix(kind, rows, columns, generator, group=group, mins=mins)
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
