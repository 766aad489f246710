"""LLM.int8 (arXiv 2208.07339) in the saved layout of bitsandbytes.

A layer has `weight`, int8 [rows, columns]; `SCB`, fp32 [rows]: the largest magnitude of each row,
which stands for 127; and `weight_format`, one byte: 0, the order of rows. Another order is that of
a GPU's kernels and is refused.

The method rounds activations to eight bits as well, but for those columns in which one of them
reaches 6. Here the numbers are multiplied as they are, or, on native kernels, with activations
rounded to eight bits by groups of columns, and twice where a group stands out: see `packed.h`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Self

import torch

from qwenkit.errors import CheckpointError, NonFiniteError
from qwenkit.formats.spec import Case, Format
from qwenkit.kernels.finite import is_finite
from qwenkit.kernels.packed import (
    KINDS,
    Packed,
    deinterleave_groups,
    interleave,
    interleave_groups,
    numbers_of,
)
from qwenkit.layers.weight import QuantWeight, WayBack

_STORAGE = "LLM_INT8"
_UNIT = KINDS["llm_int8"].unit


class LlmInt8Weight(QuantWeight):
    """A matrix as the tensors of a bitsandbytes file. Never written to.

    `weight_format` is None where the file did not say it, as the first ones did not.
    """

    weight: torch.Tensor
    scb: torch.Tensor
    weight_format: torch.Tensor | None

    def __init__(
        self, weight: torch.Tensor, scb: torch.Tensor, weight_format: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.shape = (weight.shape[0], weight.shape[1])
        self.register_buffer("weight", weight)
        self.register_buffer("scb", scb)
        self.register_buffer("weight_format", weight_format)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], *, shape: tuple[int, int], storage: str
    ) -> Self:
        """Takes "weight", "SCB" and perhaps "weight_format". Raises CheckpointError naming the
        tensor that does not fit.
        """
        expected = {
            "weight": (torch.int8, list(shape)),
            "SCB": (torch.float32, [shape[0]]),
            "weight_format": (torch.uint8, []),
        }
        for name in ("weight", "SCB", *sorted(tensors.keys() - {"weight", "SCB"})):
            dtype, size = expected.get(name, (None, []))
            tensor = tensors.get(name)
            found = None if tensor is None else (tensor.dtype, list(tensor.shape))
            if found != (dtype, size):
                raise CheckpointError(
                    f"{_STORAGE} weight",
                    name,
                    f"got {found or 'nothing'}; of {shape[0]} × {shape[1]} numbers it is "
                    f"{dtype} {size}.",
                )
        weight_format = tensors.get("weight_format")
        if weight_format is not None and not weight_format.is_meta and int(weight_format):
            raise CheckpointError(
                f"{_STORAGE} weight",
                "weight_format",
                f"is {int(weight_format)}, a GPU's own order; only 0, rows, is read. Save the "
                "model again with a bitsandbytes of today.",
            )
        return cls(tensors["weight"], tensors["SCB"], weight_format)

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> Self:
        """Quantize float [rows, columns] as bitsandbytes does, from numbers rounded to fp16.

        Raises NonFiniteError when one of these is not finite.
        """
        half = weight.detach().to(torch.float16)
        if not is_finite(half):
            raise NonFiniteError("the weight has numbers that are NaN, infinite or beyond fp16.")
        most = half.abs().amax(1).to(torch.float32)  # [rows]
        inverse = torch.where(most > 0, 127.0 / most, 0.0)[:, None]
        numbers = (half.to(torch.float32) * inverse).round_().to(torch.int8)
        return cls(numbers, most, torch.zeros((), dtype=torch.uint8))

    def to_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {"weight": self.weight, "SCB": self.scb}
        given = self.weight_format
        return tensors if given is None else tensors | {"weight_format": given}

    @property
    def storage(self) -> str:
        return _STORAGE

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.weight * self.scb[:, None] * _UNIT).to(dtype)

    def to_packed(self) -> Packed | None:
        rows, columns = self.shape
        if columns % KINDS["llm_int8"].multiple:
            return None
        data = interleave(self.weight.view(torch.uint8) ^ 128)  # from two's complement to 128 added
        return Packed(
            "llm_int8", rows, columns, data, interleave_groups(self.scb[:, None]), None, 128
        )

    def way_back(self) -> WayBack:
        return WayBack(_STORAGE, partial(_restore, self.weight_format is not None))

    def select_rows(self, index: torch.Tensor) -> Self:
        return type(self)(self.weight[index], self.scb[index], self.weight_format)

    def row_range(self, start: int, stop: int) -> Self:
        return type(self)(self.weight[start:stop], self.scb[start:stop], self.weight_format)

    def extra_repr(self) -> str:
        return f"{self.shape[0]} × {self.shape[1]}, {_STORAGE}"


def _restore(
    has_format: bool, packed: Packed, aside: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    assert packed.scales is not None
    weight = (numbers_of(packed) ^ 128).view(torch.int8)
    scb = deinterleave_groups(packed.scales, packed.rows)[:, 0].contiguous()
    tensors = {"weight": weight, "SCB": scb}
    return tensors | ({"weight_format": torch.zeros((), dtype=torch.uint8)} if has_format else {})


def _claim(storage: Mapping[str, str], quantization_config: Mapping[str, Any]) -> bool:
    return quantization_config.get("quant_method") == "bitsandbytes" and "SCB" in storage


def _tag(storage: Mapping[str, str], quantization_config: Mapping[str, Any]) -> str:
    if quantization_config.get("load_in_8bit") is not True:
        raise CheckpointError(
            "quantization_config", "load_in_8bit", "is not true, but the weights are Int8."
        )
    return _STORAGE


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for columns in (96, 70):
        original = torch.randn(40, columns, generator=generator) * 0.02
        yield Case(weight=LlmInt8Weight.quantize(original), original=original, relative_error=0.008)


FORMAT = Format(
    name="bitsandbytes-8bit",
    weight=LlmInt8Weight,
    claim=_claim,
    cases=_cases,
    tag=_tag,
    methods=("bitsandbytes",),
)
