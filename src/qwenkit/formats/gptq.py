"""GPTQ files (arXiv 2210.17323) in the layout of AutoGPTQ, GPTQModel and the published Qwen files.

A layer has `qweight`, int32 [words, rows]: numbers packed along the columns of its matrix;
`qzeros`, int32 [groups, words]: zero points packed along the rows; `scales`, fp16 [groups, rows];
and mostly `g_idx`, int32 [columns]: the group of each column, in any order under act-order. A
number is scale · (q - zero point).

Zero points are stored minus one, modulo 2^bits; where config.json says `checkpoint_format`
"gptq_v2", as they are. Nothing in the tensors tells these two apart, so that is part of the storage
tag: GPTQ4 and GPTQ4_V2 for four bits. The bits of a layer follow from its shapes; without them a
tag (GPTQ, GPTQ_V2) leaves it at that, as `dynamic` in config.json may give a layer others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Self

import torch

from qwenkit.errors import CheckpointError, UsageError
from qwenkit.formats.spec import Case, Format
from qwenkit.formats.words import BITS, pack_words, unpack_words, word_count
from qwenkit.formats.zero_points import (
    in_file_order,
    is_in_order,
    pack_groups,
    sorted_columns,
    unpack_scales,
    unpack_zero_points,
)
from qwenkit.kernels.packed import Packed
from qwenkit.layers.weight import QuantWeight, WayBack

_PARTS = {"qweight", "qzeros", "scales"}
_TAG = re.compile(r"GPTQ([2348])?(_V2)?")
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_SLAB_NUMBERS = 1 << 22  # unpacked at a time


class GptqWeight(QuantWeight):
    """A matrix as the tensors of a GPTQ file. Never written to."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor | None

    def __init__(
        self,
        qweight: torch.Tensor,
        qzeros: torch.Tensor,
        scales: torch.Tensor,
        g_idx: torch.Tensor | None,
        *,
        shape: tuple[int, int],
        bits: int,
        is_v2: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.bits, self.is_v2 = shape, bits, is_v2
        self.register_buffer("qweight", qweight)
        self.register_buffer("qzeros", qzeros)
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", g_idx)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], *, shape: tuple[int, int], storage: str
    ) -> Self:
        """Takes "qweight", "qzeros", "scales" and, unless its groups are in order, "g_idx".

        `storage` is a tag as above. Raises CheckpointError naming the tensor that does not fit.
        """
        tag = _TAG.fullmatch(storage)
        if tag is None or not tensors.keys() >= _PARTS:
            raise CheckpointError(
                f"{storage} weight",
                "tensors",
                f"got {', '.join(sorted(tensors))} as {storage!r}; expected qweight, qzeros, "
                "scales and perhaps g_idx as GPTQ4 (2, 3, 4 or 8) or GPTQ4_V2.",
            )
        (rows, columns), groups = shape, tensors["scales"].shape[0]
        words = tensors["qweight"].shape[0]
        bits = int(tag[1] or next((b for b in BITS if word_count(columns, b) == words), 4))
        expected = {
            "qweight": ((torch.int32,), [word_count(columns, bits), rows]),
            "qzeros": ((torch.int32,), [groups, word_count(rows, bits)]),
            "scales": (_SCALES, [groups, rows]),
            "g_idx": ((torch.int32,), [columns]),
        }
        for name, tensor in tensors.items():
            dtypes, sizes = expected.get(name, ((), []))
            if tensor.dtype not in dtypes or list(tensor.shape) != sizes:
                raise CheckpointError(
                    f"{storage} weight",
                    name,
                    f"got {tensor.dtype} {list(tensor.shape)}; of {rows} × {columns} numbers of "
                    f"{bits} bits in {groups} groups it has the shape {sizes or 'of nothing'}.",
                )
        g_idx = tensors.get("g_idx")
        _check_groups(storage, g_idx, groups, columns)
        parts = (tensors["qweight"], tensors["qzeros"], tensors["scales"], g_idx)
        return cls(*parts, shape=(rows, columns), bits=bits, is_v2=tag[2] is not None)

    @classmethod
    def from_integers(
        cls,
        numbers: torch.Tensor,
        scales: torch.Tensor,
        zero_points: torch.Tensor,
        g_idx: torch.Tensor,
        *,
        bits: int,
        is_v2: bool = False,
    ) -> Self:
        """Pack numbers uint8 [rows, columns], each below 2^bits, with `scales` [rows, groups], of
        any float dtype, zero points uint8 [rows, groups] and the group of each column [columns].

        Raises UsageError for other bits than 2, 3, 4 and 8, or numbers that do not fit them.
        """
        if bits not in BITS:
            raise UsageError(f"bits: got {bits}; GPTQ files have 2, 3, 4 or 8.")
        if int(numbers.max()) >> bits or int(zero_points.max()) >> bits:
            raise UsageError(f"bits: numbers or zero points do not fit {bits} bits.")
        stored = zero_points if is_v2 else (zero_points - 1) & ((1 << bits) - 1)
        return cls(
            pack_words(numbers, bits).T.clone(memory_format=torch.contiguous_format),
            pack_words(stored.T.contiguous(), bits),
            scales.T.to(torch.float16).contiguous(),
            g_idx.to(torch.int32),
            shape=(numbers.shape[0], numbers.shape[1]),
            bits=bits,
            is_v2=is_v2,
        )

    def to_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales}
        return tensors if self.g_idx is None else tensors | {"g_idx": self.g_idx}

    @property
    def storage(self) -> str:
        return f"GPTQ{self.bits}" + ("_V2" if self.is_v2 else "")

    @property
    def groups(self) -> torch.Tensor:
        """The group of each column, int64 [columns]."""
        if self.g_idx is not None:
            return self.g_idx.long()
        count = self.scales.shape[0]
        index = torch.arange(count, device=self.scales.device)
        return index.repeat_interleave(self.shape[1] // count)

    def numbers(self) -> torch.Tensor:
        """The packed numbers, uint8 [rows, columns]."""
        return unpack_words(self.qweight.T, self.bits, self.shape[1])

    def zero_points(self) -> torch.Tensor:
        """What stands for zero in each group, uint8 [rows, groups]."""
        stored = unpack_words(self.qzeros, self.bits, self.shape[0])  # [groups, rows]
        if not self.is_v2:
            stored = (stored + 1) & ((1 << self.bits) - 1)
        return stored.T.contiguous()

    @property
    def group_size(self) -> int:
        """Columns that share a scale; the last group may be shorter."""
        return -(-self.shape[1] // self.scales.shape[0])

    @property
    def is_symmetric(self) -> bool:
        """Whether the middle level stands for zero in every group."""
        return bool((self.zero_points() == 1 << (self.bits - 1)).all())

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = self.shape
        step = max(1, _SLAB_NUMBERS // max(columns, 1))
        if rows > step:
            slabs = [self.row_range(a, min(a + step, rows)) for a in range(0, rows, step)]
            return torch.cat([slab.dequantize(dtype) for slab in slabs])
        groups = self.groups
        numbers = self.numbers().to(torch.float32)  # [rows, columns]
        numbers -= self.zero_points().to(torch.float32)[:, groups]
        numbers *= self.scales.T.to(torch.float32)[:, groups]
        return numbers.to(dtype)

    def to_packed(self) -> Packed | None:
        order = sorted_columns(self.groups, self.scales.shape[0])
        if order is None:  # a last group that is shorter
            return None
        numbers, scales, zeros = self.numbers(), self.scales.T, self.zero_points()
        if is_in_order(order):
            return pack_groups(numbers, scales, zeros, bits=self.bits)
        in_order = numbers[:, order]
        return pack_groups(in_order, scales, zeros, bits=self.bits, order=order.to(torch.int32))

    def way_back(self) -> WayBack:
        has_groups = self.g_idx is not None
        how = self.bits, self.is_v2, self.scales.shape[0], self.scales.dtype, has_groups
        return WayBack(self.storage, partial(_restore, *how))

    def select_rows(self, index: torch.Tensor) -> Self:
        return self._with_rows(self.qweight[:, index], self.scales[:, index], index)

    def row_range(self, start: int, stop: int) -> Self:
        rows = slice(start, stop)
        return self._with_rows(self.qweight[:, rows], self.scales[:, rows], rows)

    def _with_rows(
        self, qweight: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor | slice
    ) -> Self:
        stored = unpack_words(self.qzeros, self.bits, self.shape[0])[:, rows]
        qzeros = pack_words(stored.contiguous(), self.bits)
        shape = qweight.shape[1], self.shape[1]
        parts = (qweight, qzeros, scales, self.g_idx)
        return type(self)(*parts, shape=shape, bits=self.bits, is_v2=self.is_v2)

    def extra_repr(self) -> str:
        return f"{self.shape[0]} × {self.shape[1]}, {self.storage}, {self.scales.shape[0]} groups"


def _restore(
    bits: int,
    is_v2: bool,
    groups: int,
    dtype: torch.dtype,
    has_groups: bool,
    packed: Packed,
    aside: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    numbers, g_idx = in_file_order(packed, groups)
    scales, zeros = unpack_scales(packed, groups), unpack_zero_points(packed, groups)
    weight = GptqWeight.from_integers(numbers, scales, zeros, g_idx, bits=bits, is_v2=is_v2)
    tensors = weight.to_tensors() | {
        "scales": scales.T.to(dtype).clone(memory_format=torch.contiguous_format)
    }
    return {name: t for name, t in tensors.items() if has_groups or name != "g_idx"}


def _check_groups(storage: str, g_idx: torch.Tensor | None, groups: int, columns: int) -> None:
    if g_idx is None:
        if not groups or columns % groups:
            raise CheckpointError(
                f"{storage} weight",
                "g_idx",
                f"is missing, and {groups} groups do not divide {columns} columns.",
            )
    elif g_idx.device.type != "meta" and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise CheckpointError(f"{storage} weight", "g_idx", f"names a group beyond its {groups}.")


def _claim(storage: Mapping[str, str], quantization_config: Mapping[str, Any]) -> bool:
    return quantization_config.get("quant_method") == "gptq" and storage.keys() >= _PARTS


def _tag(storage: Mapping[str, str], quantization_config: Mapping[str, Any]) -> str:
    bits = quantization_config.get("bits")
    if type(bits) is not int or bits not in BITS:
        raise CheckpointError("quantization_config", "bits", f"got {bits!r}; allowed: 2, 3, 4, 8.")
    stated = quantization_config.get("checkpoint_format", "gptq")
    if stated not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            "quantization_config",
            "checkpoint_format",
            f"got {stated!r}; only 'gptq' and 'gptq_v2' are read. Get the model in one of these.",
        )
    known = "" if quantization_config.get("dynamic") else str(bits)
    return f"GPTQ{known}" + ("_V2" if stated == "gptq_v2" else "")


def _check(weight: QuantWeight, quantization_config: Mapping[str, Any]) -> None:
    """The group size, and, of symmetric files, which of the two conventions zero points follow."""
    assert isinstance(weight, GptqWeight)
    if quantization_config.get("dynamic"):  # which may say otherwise of a layer
        return
    size, groups = quantization_config.get("group_size"), weight.scales.shape[0]
    columns = weight.shape[1]
    if type(size) is int and groups != -(-columns // (columns if size < 1 else size)):
        raise CheckpointError(
            "quantization_config",
            "group_size",
            f"is {size}, but {columns} columns have {groups} groups.",
        )
    half = 1 << (weight.bits - 1)
    wrong = half - 1 if weight.is_v2 else half + 1
    if quantization_config.get("sym") is True and bool((weight.zero_points() == wrong).all()):
        right = "gptq" if weight.is_v2 else "gptq_v2"
        raise CheckpointError(
            "quantization_config",
            "checkpoint_format",
            f"zero points are all {wrong}, but of symmetric numbers of {weight.bits} bits they are "
            f"{half}: the file is {right!r}. Say so in config.json.",
        )


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    columns = 192
    # bits, group size, version 2, in order, error on normally distributed numbers
    variants = (
        (2, 32, False, True, 0.66),
        (3, 64, True, True, 0.32),
        (3, 32, False, False, 0.30),
        (4, 64, False, True, 0.14),
        (4, columns, True, True, 0.16),
        (4, 32, False, False, 0.13),
        (8, 64, True, False, 0.009),
    )
    for bits, size, is_v2, in_order, error in variants:
        original = torch.randn(40, columns, generator=generator) * 0.02
        groups = torch.arange(columns) // size
        if not in_order:
            groups = groups[torch.randperm(columns, generator=generator)]
        count, top = columns // size, (1 << bits) - 1
        sorted_columns = groups.argsort(stable=True)
        grouped = original[:, sorted_columns].view(40, count, size)
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scales = ((high - low) / top).half().float()  # [rows, groups]
        zeros = (-low / scales).round().clamp(0, top)
        numbers = (original / scales[:, groups] + zeros[:, groups]).round().clamp(0, top)
        weight = GptqWeight.from_integers(
            numbers.to(torch.uint8), scales, zeros.to(torch.uint8), groups, bits=bits, is_v2=is_v2
        )
        yield Case(weight=weight, original=original, relative_error=error)


FORMAT = Format(
    name="gptq",
    weight=GptqWeight,
    claim=_claim,
    cases=_cases,
    tag=_tag,
    check=_check,
    methods=("gptq",),
)
