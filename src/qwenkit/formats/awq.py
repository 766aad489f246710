"""AWQ files (arXiv 2306.00978) in the two layouts of AutoAWQ, four bits each.

GEMM, that of the published Qwen files: `qweight`, int32 [columns, rows / 8], and `qzeros`, int32
[groups, rows / 8], are packed along the rows, where a word holds, lowest bits first, the rows
0, 2, 4, 6, 1, 3, 5, 7 of its eight; `scales`, fp16 [groups, rows].

GEMV: `qweight`, int32 [rows, columns / 8], and `qzeros`, int32 [rows, words], are packed along the
columns and groups, in order; `scales`, fp16 [rows, 8 · words]. What is left of the words of zero
points and of the scales, which are widened for the kernel, is zero.

A number is scale · (q - zero point); groups are runs of `group_size` columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Self

import torch

from qwenkit.errors import CheckpointError, UsageError, suggest
from qwenkit.formats.spec import Case, Format
from qwenkit.formats.words import pack_words, unpack_words
from qwenkit.formats.zero_points import pack_groups, unpack_scales, unpack_zero_points
from qwenkit.kernels.packed import Packed, numbers_of
from qwenkit.layers.weight import QuantWeight, WayBack

BITS = 4
LAYOUTS = ("gemm", "gemv")
_PARTS = {"qweight", "qzeros", "scales"}
_TAG = re.compile(r"AWQ4_(GEMM|GEMV)_G(\d+)")
_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # of the rows in a word, lowest bits first
_SLAB_NUMBERS = 1 << 22  # unpacked at a time


class AwqWeight(QuantWeight):
    """A matrix as the tensors of an AWQ file. Never written to."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor

    bits = BITS

    def __init__(
        self,
        qweight: torch.Tensor,
        qzeros: torch.Tensor,
        scales: torch.Tensor,
        *,
        shape: tuple[int, int],
        group_size: int,
        layout: str,
    ) -> None:
        super().__init__()
        self.shape, self.group_size, self.layout = shape, group_size, layout
        self.register_buffer("qweight", qweight)
        self.register_buffer("qzeros", qzeros)
        self.register_buffer("scales", scales)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], *, shape: tuple[int, int], storage: str
    ) -> Self:
        """Takes "qweight", "qzeros" and "scales" of a tag such as AWQ4_GEMM_G128; a group size of
        0 is that of the whole row. Raises CheckpointError naming the tensor that does not fit.
        """
        tag = _TAG.fullmatch(storage)
        if tag is None or tensors.keys() != _PARTS:
            raise CheckpointError(
                f"{storage} weight",
                "tensors",
                f"got {', '.join(sorted(tensors))} as {storage!r}; expected qweight, qzeros and "
                "scales as AWQ4_GEMM_G128 or AWQ4_GEMV_G128, of any group size.",
            )
        rows, columns = shape
        layout, size = tag[1].lower(), int(tag[2]) or columns
        if columns % size or (layout == "gemv" and columns % 8):
            raise CheckpointError(
                f"{storage} weight",
                "qweight",
                f"{rows} × {columns} numbers cannot be packed by eight in groups of {size}.",
            )
        for name, (dtype, sizes) in _expected(layout, rows, columns, size).items():
            tensor = tensors[name]
            if tensor.dtype != dtype or list(tensor.shape) != sizes:
                raise CheckpointError(
                    f"{storage} weight",
                    name,
                    f"got {tensor.dtype} {list(tensor.shape)}; of {rows} × {columns} numbers in "
                    f"groups of {size} it is {dtype} {sizes}.",
                )
        parts = (tensors["qweight"], tensors["qzeros"], tensors["scales"])
        return cls(*parts, shape=(rows, columns), group_size=size, layout=layout)

    @classmethod
    def from_integers(
        cls,
        numbers: torch.Tensor,
        scales: torch.Tensor,
        zero_points: torch.Tensor,
        *,
        layout: str = "gemm",
    ) -> Self:
        """Pack numbers uint8 [rows, columns] with `scales` [rows, groups], of any float dtype, and
        zero points uint8 [rows, groups], both below 16.

        Raises UsageError for another layout, numbers that do not fit four bits, or sizes that
        cannot be packed.
        """
        if layout not in LAYOUTS:
            raise UsageError(f"layout: got {layout!r}. {suggest(layout, LAYOUTS)}")
        (rows, columns), groups = numbers.shape, scales.shape[1]
        if columns % groups or (layout == "gemv" and columns % 8):
            raise UsageError(
                f"{layout}: {rows} × {columns} numbers cannot be packed in {groups} groups."
            )
        if int(numbers.max()) >> BITS or int(zero_points.max()) >> BITS:
            raise UsageError("numbers or zero points do not fit four bits.")
        half = scales.to(torch.float16)
        if layout == "gemm":
            tensors = (
                pack_words(_into_order(numbers.T), BITS),
                pack_words(_into_order(zero_points.T), BITS),
                half.T.contiguous(),
            )
        else:
            words = gemv_words(columns, columns // groups)
            wide = torch.nn.functional.pad(zero_points, (0, words * 8 - groups))
            half = torch.nn.functional.pad(half, (0, words * 8 - groups))
            tensors = pack_words(numbers.contiguous(), BITS), pack_words(wide, BITS), half
        return cls(*tensors, shape=(rows, columns), group_size=columns // groups, layout=layout)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        return {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales}

    @property
    def storage(self) -> str:
        return f"AWQ4_{self.layout.upper()}_G{self.group_size}"

    def numbers(self) -> torch.Tensor:
        """The packed numbers, uint8 [rows, columns]."""
        rows, columns = self.shape
        if self.layout == "gemv":
            return unpack_words(self.qweight, BITS, columns)
        return _out_of_order(unpack_words(self.qweight, BITS, self.qweight.shape[1] * 8)).T[:rows]

    def zero_points(self) -> torch.Tensor:
        """What stands for zero in each group, uint8 [rows, groups]."""
        rows, columns = self.shape
        if self.layout == "gemv":
            return unpack_words(self.qzeros, BITS, columns // self.group_size)
        return _out_of_order(unpack_words(self.qzeros, BITS, self.qzeros.shape[1] * 8)).T[:rows]

    def group_scales(self) -> torch.Tensor:
        """fp16 [rows, groups]."""
        groups = self.shape[1] // self.group_size
        return self.scales[:, :groups] if self.layout == "gemv" else self.scales.T

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = self.shape
        step = max(8, _SLAB_NUMBERS // max(columns, 1) // 8 * 8)
        if rows > step:
            slabs = [self.row_range(a, min(a + step, rows)) for a in range(0, rows, step)]
            return torch.cat([slab.dequantize(dtype) for slab in slabs])
        grouped = (
            self.numbers()
            .reshape(rows, columns // self.group_size, self.group_size)
            .to(torch.float32)
        )
        grouped = grouped - self.zero_points().to(torch.float32)[:, :, None]
        grouped *= self.group_scales().to(torch.float32)[:, :, None]
        return grouped.view(rows, columns).to(dtype)

    def to_packed(self) -> Packed | None:
        return pack_groups(self.numbers(), self.group_scales(), self.zero_points(), bits=BITS)

    def way_back(self) -> WayBack:
        groups = self.shape[1] // self.group_size
        return WayBack(self.storage, partial(_restore, self.layout, groups))

    def select_rows(self, index: torch.Tensor) -> Self:
        if self.layout == "gemv":
            parts = self.qweight[index], self.qzeros[index], self.scales[index]
            return self._of(*parts, len(index))
        packed = []
        for words in (self.qweight, self.qzeros):
            numbers = _out_of_order(unpack_words(words, BITS, words.shape[1] * 8))
            packed.append(pack_words(_into_order(numbers[:, index]), BITS))
        return self._of(packed[0], packed[1], self.scales[:, index], len(index))

    def row_range(self, start: int, stop: int) -> Self:
        rows, words = slice(start, stop), slice(start // 8, stop // 8)
        if self.layout == "gemv":
            return self._of(self.qweight[rows], self.qzeros[rows], self.scales[rows], stop - start)
        if start % 8 or stop % 8:
            return super().row_range(start, stop)
        parts = self.qweight[:, words], self.qzeros[:, words], self.scales[:, rows]
        return self._of(*parts, stop - start)

    def _of(
        self, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, rows: int
    ) -> Self:
        return type(self)(
            *(qweight, qzeros, scales),
            shape=(rows, self.shape[1]),
            group_size=self.group_size,
            layout=self.layout,
        )

    def extra_repr(self) -> str:
        return f"{self.shape[0]} × {self.shape[1]}, {self.storage}"


def gemv_words(columns: int, group_size: int) -> int:
    """Words of zero points in a row of the GEMV layout: its kernel reads them for 1,024 columns at
    a time, and so groups of 64 and 32 come in twos and fours of words.
    """
    times = 4 if group_size <= 32 else 2 if group_size <= 64 else 1
    words = -(-(columns // group_size) // 8)
    return -(-words // times) * times


def _restore(
    layout: str, groups: int, packed: Packed, aside: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    scales, zeros = unpack_scales(packed, groups), unpack_zero_points(packed, groups)
    weight = AwqWeight.from_integers(numbers_of(packed), scales, zeros, layout=layout)
    return weight.to_tensors()


def _into_order(numbers: torch.Tensor) -> torch.Tensor:
    """[n, rows] in the order of a word's bits; the last word is filled up with zeros."""
    filled = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % 8))
    return filled.reshape(len(filled), -1, 8)[:, :, _ORDER.to(numbers.device)].flatten(1)


def _out_of_order(numbers: torch.Tensor) -> torch.Tensor:
    """The inverse for whole words: [n, 8 · words] in the order of rows."""
    order = _ORDER.argsort().to(numbers.device)
    return numbers.reshape(len(numbers), -1, 8)[:, :, order].flatten(1)


def _expected(
    layout: str, rows: int, columns: int, size: int
) -> dict[str, tuple[torch.dtype, list[int]]]:
    groups = columns // size
    if layout == "gemm":
        return {
            "qweight": (torch.int32, [columns, -(-rows // 8)]),
            "qzeros": (torch.int32, [groups, -(-rows // 8)]),
            "scales": (torch.float16, [groups, rows]),
        }
    words = gemv_words(columns, size)
    return {
        "qweight": (torch.int32, [rows, columns // 8]),
        "qzeros": (torch.int32, [rows, words]),
        "scales": (torch.float16, [rows, 8 * words]),
    }


def _claim(storage: Mapping[str, str], quantization_config: Mapping[str, Any]) -> bool:
    return quantization_config.get("quant_method") == "awq" and storage.keys() >= _PARTS


def _tag(storage: Mapping[str, str], quantization_config: Mapping[str, Any]) -> str:
    """From `bits`, `group_size` and `version`, under AutoAWQ's older names as well."""
    bits = quantization_config.get("bits", quantization_config.get("w_bit"))
    size = quantization_config.get("group_size", quantization_config.get("q_group_size"))
    layout = str(quantization_config.get("version", "gemm")).lower()
    if bits != BITS:
        raise CheckpointError("quantization_config", "bits", f"got {bits!r}; AWQ files have 4.")
    if type(size) is not int or size < -1 or size == 0:
        raise CheckpointError(
            "quantization_config", "group_size", f"got {size!r}; expected columns, or -1 for all."
        )
    if layout not in LAYOUTS:
        raise CheckpointError(
            "quantization_config", "version", f"got {layout!r}. {suggest(layout, LAYOUTS)}"
        )
    return f"AWQ4_{layout.upper()}_G{max(size, 0)}"


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for layout, size, error in (("gemm", 64, 0.14), ("gemm", 192, 0.16), ("gemv", 32, 0.13)):
        original = torch.randn(40, 192, generator=generator) * 0.02
        grouped = original.view(40, -1, size)
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scales = ((high - low) / 15).half().float()  # [rows, groups]
        zeros = (-low / scales).round().clamp(0, 15)
        numbers = (grouped / scales[:, :, None] + zeros[:, :, None]).round().clamp(0, 15)
        weight = AwqWeight.from_integers(
            numbers.view(40, 192).to(torch.uint8), scales, zeros.to(torch.uint8), layout=layout
        )
        yield Case(weight=weight, original=original, relative_error=error)


FORMAT = Format(
    name="awq", weight=AwqWeight, claim=_claim, cases=_cases, tag=_tag, methods=("awq",)
)
