"""A weight as a value: the interface that every quantized storage format implements.

`Linear.weight` and `Embedding.weight` hold either a plain parameter or a `QuantWeight`. Nothing
outside `qwenkit.formats` knows which format it is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from qwenkit.errors import NonFiniteError, UsageError
from qwenkit.kernels.finite import is_finite
from qwenkit.kernels.ops.grouped_matmul import segments
from qwenkit.kernels.packed import Packed


@dataclass(frozen=True, slots=True)
class WayBack:
    """How a weight in panels becomes the tensors of its file again: `restore` makes them of the
    panels and of what is not in these, `aside`. `storage` is the storage tag. `of_rows` is the way
    back of some of the rows only; None: it is the same.
    """

    storage: str
    restore: Callable[[Packed, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    aside: Mapping[str, torch.Tensor] = field(default_factory=dict)
    of_rows: WayBack | None = None


class QuantWeight(nn.Module):
    """A matrix [rows, columns] kept in a storage format.

    A subclass implements `dequantize`, `from_tensors` and `to_tensors`; the rest has defaults.
    Everything is held in buffers, which `.to(dtype)` moves between devices but never converts.
    """

    shape: tuple[int, int]

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """All numbers as [rows, columns] in `dtype`."""

    @classmethod
    @abstractmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], *, shape: tuple[int, int], storage: str
    ) -> Self:
        """Build from the tensors of a file, by their published names below the layer's path.

        `storage` is the storage tag of the main tensor. Tensors are kept as they are (possibly
        memory-mapped), not copied.
        """

    @abstractmethod
    def to_tensors(self) -> dict[str, torch.Tensor]:
        """The exact inverse of `from_tensors`: the same names, shapes, dtypes and bytes."""

    @abstractmethod
    def select_rows(self, index: torch.Tensor) -> Self:
        """The weight made of the given rows ([n] int64), still quantized, bytes unchanged."""

    @property
    @abstractmethod
    def storage(self) -> str:
        """The storage tag, as a file header names it."""

    def to_packed(self) -> Packed | None:
        """The numbers in the panels that native products read; None where there is no such form.

        Where there is one, `way_back` is the way back from it.
        """
        return None

    def way_back(self) -> WayBack:
        """How panels of the whole weight become `to_tensors` again, byte for byte.

        Raises UsageError where there are none.
        """
        raise UsageError(f"{self.storage} weights have no panels.")

    def check_finite(self) -> None:
        """Raises NonFiniteError when a number is NaN or infinite.

        Looks at floating-point buffers, such as scales: made of finite ones, a number is finite.
        """
        for name, buffer in self.named_buffers():
            if buffer.is_floating_point() and not is_finite(buffer):
                raise NonFiniteError(
                    f"{self.storage} weight {list(self.shape)}: one of its {name} is NaN or "
                    "infinite. The file is damaged; fetch it again."
                )

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def matmul(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [..., columns] times the transposed weight, plus bias [rows] and residual [..., rows].

        [..., rows]; differentiable in x.
        """
        y = functional.linear(x, self.dequantize(x.dtype), bias)
        return y if residual is None else residual + y

    def project(
        self,
        x: torch.Tensor,
        weights: Sequence[QuantWeight],
        biases: Sequence[torch.Tensor | None],
        norm: torch.Tensor | None,
        epsilon: float,
    ) -> list[torch.Tensor] | None:
        """x [..., columns], normalised by its root mean square with the weights `norm` where they
        are given, times each of `weights`, of which this is the first, plus its bias.

        None where the format has no such product of these: then they are multiplied one by one.
        """
        return None

    def gated(
        self, x: torch.Tensor, up: QuantWeight, norm: torch.Tensor | None, epsilon: float
    ) -> torch.Tensor | None:
        """silu(n(x) Wᵀ) · n(x) upᵀ of this weight and another, n as in `project`; or None."""
        return None

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows of the given ids [tokens] as [tokens, columns] in `dtype`."""
        return self.select_rows(ids).dequantize(dtype)

    def row_range(self, start: int, stop: int) -> Self:
        """The weight made of rows `start` to `stop`, still quantized.

        A copy unless the format knows how to take a view.
        """
        device = next(self.buffers()).device
        return self.select_rows(torch.arange(start, stop, device=device))

    def grouped_matmul(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """As the op `grouped_matmul`: x [rows, columns] sorted by group, this weight being
        [groups * out_rows, columns], to [rows, out_rows]. Groups without rows are not read.
        """
        out_rows = self.shape[0] // ends.numel()
        pieces = [
            self.row_range(group * out_rows, (group + 1) * out_rows).matmul(x[a:b])
            for group, a, b in segments(ends)
        ]
        return torch.cat(pieces) if pieces else x.new_empty((0, out_rows))

    def grouped_gated(
        self, x: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, up: QuantWeight
    ) -> torch.Tensor | None:
        """silu(gate) · up of `grouped_matmul` with x[order], this being the gate; None where the
        format has no such product: then they are multiplied one by one.
        """
        return None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        for name, buffer in self.named_buffers(recurse=False):
            # A format's bytes and scales mean what they are only in their own dtype.
            setattr(self, name, buffer.to(device=fn(buffer).device))
        return self
