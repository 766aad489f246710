"""Whole numbers of compressed-tensors, with a scale for a row or a group of columns: W4A16, W8A16
(`pack-quantized`) and W8A8 (`int-quantized`).

Packed, a layer has `weight_packed`, int32 [rows, words], the first numbers in the lowest bits, each
with half of its range added; `weight_shape`, int64 [2]; `weight_scale` [rows, groups]; and, where
it is not symmetric, `weight_zero_point`, packed along the rows, int32 [words, groups], or plain
int8 [rows, groups]. `weight_g_idx`, int32 [columns], is the group of each column under act-order.

Unpacked it has `weight`, int8 [rows, columns], `weight_scale` [rows, 1], or [1] for the whole
weight, and perhaps `weight_zero_point`, int8 of that shape. A number is scale · (q - zero point).
What belongs to activations is kept and not used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Self

import torch

from qwenkit.errors import CheckpointError
from qwenkit.formats.compressed_config import schemes
from qwenkit.formats.spec import Case, Format
from qwenkit.formats.words import pack_words, unpack_words, word_count
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

_TAG = re.compile(r"COMPRESSED_INT([48])")
_UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SLAB_NUMBERS = 1 << 22  # made at a time
_PLAIN = torch.contiguous_format  # also where a size is one and any stride would do


class CompressedIntWeight(QuantWeight):
    """A matrix as the tensors of a file. Never written to."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], *, shape: tuple[int, int], bits: int
    ) -> None:
        """`tensors` by their names in a file, as `from_tensors` checks them."""
        super().__init__()
        self.shape, self.bits = shape, bits
        self._parts = tuple(tensors)
        for part, tensor in tensors.items():
            self.register_buffer(_buffer(part), tensor)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], *, shape: tuple[int, int], storage: str
    ) -> Self:
        """Takes the tensors named above, of a tag such as COMPRESSED_INT4. Raises CheckpointError
        naming the tensor that does not fit.
        """
        tag = _TAG.fullmatch(storage)
        is_packed = "weight_packed" in tensors
        needed = {"weight_packed", "weight_shape"} if is_packed else {"weight"}
        known = needed | {"weight_scale", "weight_zero_point", *_UNUSED}
        known |= {"weight_g_idx"} if is_packed else set()
        if tag is None or not needed | {"weight_scale"} <= tensors.keys() <= known:
            found = ", ".join(sorted(tensors))
            raise _error(storage, "tensors", f"got {found}; expected {', '.join(sorted(needed))}.")
        bits = int(tag[1]) if is_packed else 8
        made = cls(tensors, shape=shape, bits=bits)
        for part, allowed in made._expected().items():
            tensor = tensors.get(part)
            if tensor is not None and (tensor.dtype, list(tensor.shape)) not in allowed:
                wanted = " or ".join(f"{dtype} {size}" for dtype, size in allowed[:2])
                raise _error(
                    storage,
                    part,
                    f"got {tensor.dtype} {list(tensor.shape)}; of {shape[0]} × {shape[1]} numbers "
                    f"of {bits} bits it is {wanted}.",
                )
        made._check_values(storage)
        return made

    def _expected(self) -> dict[str, list[tuple[torch.dtype, list[int]]]]:
        """What each tensor may be, given how many groups the scales have."""
        (rows, columns), scale = self.shape, self._part("weight_scale")
        groups = scale.shape[1] if scale.dim() == 2 and scale.shape[1] else 1
        of_scale = [[rows, groups], [1]]
        if columns % groups and "weight_g_idx" not in self._parts:
            of_scale = []
        of_zeros = [(torch.int8, size) for size in of_scale]
        of_zeros += [(torch.int32, [word_count(rows, self.bits), groups])]
        return {
            "weight_packed": [(torch.int32, [rows, word_count(columns, self.bits)])],
            "weight_shape": [(torch.int64, [2])],
            "weight": [(torch.int8, [rows, columns])],
            "weight_scale": [(dtype, size) for size in of_scale for dtype in _DTYPES],
            "weight_zero_point": of_zeros,
            "weight_g_idx": [(torch.int32, [columns])],
        }

    def _check_values(self, storage: str) -> None:
        stated, g_idx = self._some("weight_shape"), self._some("weight_g_idx")
        if stated is not None and not stated.is_meta and tuple(stated.tolist()) != self.shape:
            raise _error(storage, "weight_shape", f"is {stated.tolist()}, not {list(self.shape)}.")
        groups = self.group_scales().shape[1]
        if g_idx is None or g_idx.is_meta:
            return
        if not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
            raise _error(storage, "weight_g_idx", f"names a group beyond its {groups}.")

    @classmethod
    def from_integers(
        cls,
        numbers: torch.Tensor,
        scales: torch.Tensor,
        zero_points: torch.Tensor | None = None,
        *,
        bits: int,
        is_packed: bool = True,
    ) -> Self:
        """Numbers int8 [rows, columns], each within its bits, with `scales` [rows, groups] of a
        float dtype and zero points int8 [rows, groups].
        """
        half = 1 << (bits - 1)
        tensors = {"weight_scale": scales}
        if is_packed:
            tensors["weight_packed"] = pack_words((numbers + half).to(torch.uint8), bits)
            tensors["weight_shape"] = torch.tensor(numbers.shape)
        else:
            tensors["weight"] = numbers
        if zero_points is not None:
            raised = (zero_points + half).to(torch.uint8)
            packed = pack_words(raised.T.contiguous(), bits).T.clone(memory_format=_PLAIN)
            tensors["weight_zero_point"] = packed if is_packed else zero_points
        return cls(tensors, shape=(numbers.shape[0], numbers.shape[1]), bits=bits)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        return {part: self._part(part) for part in self._parts}

    @property
    def storage(self) -> str:
        return f"COMPRESSED_INT{self.bits}"

    def _part(self, part: str) -> torch.Tensor:
        tensor = getattr(self, _buffer(part))
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def _some(self, part: str) -> torch.Tensor | None:
        return self._part(part) if part in self._parts else None

    def numbers(self) -> torch.Tensor:
        """With half of the range added, uint8 [rows, columns]."""
        packed = self._some("weight_packed")
        if packed is None:
            return self._part("weight").view(torch.uint8) ^ 128
        return unpack_words(packed, self.bits, self.shape[1])

    def group_scales(self) -> torch.Tensor:
        """[rows, groups]."""
        scale = self._part("weight_scale")
        return scale if scale.dim() == 2 else scale.view(1, 1).expand(self.shape[0], 1)

    def zero_points(self) -> torch.Tensor | int:
        """With half of the range added: uint8 [rows, groups], or one for all."""
        half, stored = 1 << (self.bits - 1), self._some("weight_zero_point")
        if stored is None:
            return half
        if stored.dtype is torch.int32:
            return unpack_words(stored.T, self.bits, self.shape[0]).T.contiguous()
        raised = (stored.to(torch.int16) + half).to(torch.uint8)
        return raised if raised.dim() == 2 else raised.view(1, 1).expand(self.shape[0], 1)

    @property
    def group_size(self) -> int:
        """Columns that share a scale; the last group may be shorter."""
        return -(-self.shape[1] // self.group_scales().shape[1])

    @property
    def is_symmetric(self) -> bool:
        """Whether no group has a zero point of its own."""
        return self._some("weight_zero_point") is None

    @property
    def _groups(self) -> torch.Tensor:
        """The group of each column, int64 [columns]."""
        g_idx, count = self._some("weight_g_idx"), self.group_scales().shape[1]
        if g_idx is not None:
            return g_idx.long()
        columns = torch.arange(self.shape[1], device=self._part("weight_scale").device)
        return columns // (self.shape[1] // count)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = self.shape
        step = max(1, _SLAB_NUMBERS // columns)
        if rows > step:
            slabs = [self.row_range(a, min(a + step, rows)) for a in range(0, rows, step)]
            return torch.cat([slab.dequantize(dtype) for slab in slabs])
        zeros, groups = self.zero_points(), self._groups
        numbers = self.numbers().to(torch.float32)
        numbers -= zeros if isinstance(zeros, int) else zeros.to(torch.float32)[:, groups]
        numbers *= self.group_scales().to(torch.float32)[:, groups]
        return numbers.to(dtype)

    def to_packed(self) -> Packed | None:
        g_idx = self._some("weight_g_idx")
        scales = self.group_scales()
        found = None if g_idx is None else sorted_columns(g_idx, scales.shape[1])
        if g_idx is not None and found is None:
            return None
        order = None if found is None or is_in_order(found) else found
        numbers = self.numbers() if order is None else self.numbers()[:, order]
        order = None if order is None else order.to(torch.int32)
        return pack_groups(numbers, scales, self.zero_points(), bits=self.bits, order=order)

    def way_back(self) -> WayBack:
        shapes = {part: (t.dtype, t.dim()) for part, t in self.to_tensors().items()}
        unused = {part: self._part(part) for part in self._parts if part in _UNUSED}
        groups = self.group_scales().shape[1]
        return WayBack(self.storage, partial(_restore, self.bits, groups, shapes), unused)

    def select_rows(self, index: torch.Tensor) -> Self:
        tensors = self.to_tensors()
        for part, tensor in tensors.items():
            if part == "weight_shape":
                tensors[part] = torch.tensor([len(index), self.shape[1]])
            elif part == "weight_zero_point" and tensor.dtype is torch.int32:
                numbers = unpack_words(tensor.T, self.bits, self.shape[0])[:, index]
                tensors[part] = pack_words(numbers.contiguous(), self.bits).T.clone(
                    memory_format=_PLAIN
                )
            elif part in _OF_ROWS and tensor.dim() == 2:
                tensors[part] = tensor[index]
        return type(self)(tensors, shape=(len(index), self.shape[1]), bits=self.bits)

    def extra_repr(self) -> str:
        groups = self.group_scales().shape[1]
        return f"{self.shape[0]} × {self.shape[1]}, {self.storage}, {groups} groups"


_OF_ROWS = ("weight_packed", "weight", "weight_scale", "weight_zero_point")


def _buffer(part: str) -> str:
    """A module has a property `weight` in mind already where a tensor is called so."""
    return f"stored_{part}"


def _error(storage: str, field: str, message: str) -> CheckpointError:
    return CheckpointError(f"{storage} weight", field, message)


def _restore(
    bits: int,
    groups: int,
    shapes: Mapping[str, tuple[torch.dtype, int]],
    packed: Packed,
    aside: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    numbers, g_idx = in_file_order(packed, groups)
    scales, zeros = unpack_scales(packed, groups), unpack_zero_points(packed, groups)
    made: dict[str, torch.Tensor] = dict(aside)
    for part, (dtype, dimensions) in shapes.items():
        if part == "weight_packed":
            made[part] = pack_words(numbers, bits)
        elif part == "weight":
            made[part] = (numbers ^ 128).view(torch.int8)
        elif part == "weight_shape":
            made[part] = torch.tensor([packed.rows, packed.columns])
        elif part == "weight_g_idx":
            made[part] = g_idx.to(torch.int32)
        elif part == "weight_scale":
            kept = scales if dimensions == 2 else scales[0]
            made[part] = kept.to(dtype).clone(memory_format=_PLAIN)
        elif part == "weight_zero_point" and dtype is torch.int32:
            made[part] = pack_words(zeros.T.contiguous(), bits).T.clone(memory_format=_PLAIN)
        elif part == "weight_zero_point":
            lowered = (zeros.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
            made[part] = (lowered if dimensions == 2 else lowered[0]).clone(memory_format=_PLAIN)
    return {part: made[part] for part in shapes}


def _claim(storage: Mapping[str, str], quantization_config: Mapping[str, Any]) -> bool:
    if quantization_config.get("quant_method") != "compressed-tensors":
        return False
    return "weight_packed" in storage or storage.get("weight") == "I8"


def _tag(storage: Mapping[str, str], quantization_config: Mapping[str, Any]) -> str:
    bits = {s.bits for s in schemes(quantization_config) if s.type == "int"}
    if "weight" in storage:
        bits &= {8}
    if len(bits) != 1:
        stated = ", ".join(map(str, sorted(bits))) or "none"
        raise CheckpointError(
            "quantization_config",
            "config_groups",
            f"weights are whole numbers, and of those it has {stated} bits; one number is read.",
        )
    return f"COMPRESSED_INT{bits.pop()}"


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    # bits, columns to a scale, symmetric, packed, error on normally distributed numbers
    variants = (
        (4, 64, True, True, 0.14),
        (4, 32, False, True, 0.13),
        (4, 192, False, True, 0.17),
        (8, 192, True, False, 0.009),
        (8, 64, True, True, 0.008),
        (8, 192, False, False, 0.009),
    )
    for bits, size, symmetric, is_packed, error in variants:
        half = 1 << (bits - 1)
        original = torch.randn(40, 192, generator=generator) * 0.02
        grouped = original.view(40, -1, size)
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        zeros = None
        if symmetric:
            scales = (torch.maximum(-low, high) / (half - 0.5)).to(torch.bfloat16)
            shifted = grouped / scales[:, :, None].float()
        else:
            scales = ((high - low) / (2 * half - 1)).to(torch.float16)
            zeros = (-low / scales - half).round().clamp(-half, half - 1).to(torch.int8)
            shifted = grouped / scales[:, :, None].float() + zeros[:, :, None]
        numbers = shifted.round().clamp(-half, half - 1).view(40, 192).to(torch.int8)
        weight = CompressedIntWeight.from_integers(
            numbers, scales, zeros, bits=bits, is_packed=is_packed
        )
        yield Case(weight=weight, original=original, relative_error=error)


def _check(weight: QuantWeight, quantization_config: Mapping[str, Any]) -> None:
    assert isinstance(weight, CompressedIntWeight)
    bits, groups = weight.bits, weight.group_scales().shape[1]
    symmetric = "weight_zero_point" not in weight.to_tensors()
    stated = [s for s in schemes(quantization_config) if (s.type, s.bits) == ("int", bits)]
    for scheme in stated:
        expected = weight.shape[1] / scheme.group_size if scheme.strategy == "group" else 1
        if (expected, scheme.symmetric) == (groups, symmetric):
            return
    said = "; ".join(f"{s.strategy} {s.group_size or ''}, symmetric {s.symmetric}" for s in stated)
    raise CheckpointError(
        "quantization_config",
        "config_groups",
        f"it says {said}; the tensors have {groups} groups of {weight.shape[1]} columns and "
        f"{'no' if symmetric else 'their own'} zero points.",
    )


FORMAT = Format(
    name="compressed-tensors",
    weight=CompressedIntWeight,
    claim=_claim,
    cases=_cases,
    tag=_tag,
    check=_check,
    methods=("compressed-tensors",),
)
