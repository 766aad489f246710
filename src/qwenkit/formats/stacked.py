"""Several weights of one width below each other as one: experts that were quantized one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, cast

import torch

from qwenkit.errors import UsageError
from qwenkit.kernels.ops.grouped_matmul import segments
from qwenkit.kernels.packed import PANEL_ROWS, Packed
from qwenkit.layers.weight import QuantWeight, WayBack


class StackedWeight(QuantWeight):
    """Weights of one width, one below the other; each keeps its own format and its own bytes.

    A range of rows that is one of the parts is that part. In files every part has a path of its
    own, so that this has no tensors of its own names.
    """

    def __init__(self, parts: Sequence[QuantWeight]) -> None:
        """Raises UsageError for none, or for parts of different widths."""
        super().__init__()
        widths = {part.shape[1] for part in parts}
        if len(widths) != 1:
            raise UsageError(f"parts: expected weights of one width, got {sorted(widths)}.")
        for number, part in enumerate(parts):  # of this module itself: a list would be no weight
            self.add_module(str(number), part)
        self.shape = (sum(part.shape[0] for part in parts), widths.pop())

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], *, shape: tuple[int, int], storage: str
    ) -> Self:
        """Raises UsageError: the parts are read one by one."""
        raise UsageError(f"{storage}: stacked weights are read part by part.")

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Every part's tensors, their names behind the part's number."""
        return {
            f"{number}.{name}": tensor
            for number, part in enumerate(self._parts)
            for name, tensor in part.to_tensors().items()
        }

    @property
    def storage(self) -> str:
        return self._parts[0].storage

    def to_packed(self) -> Packed | None:
        """The parts' panels one below the other, where all are alike and none ends in a panel."""
        parts = [part.to_packed() for part in self._parts]
        alike = [p for p in parts if p is not None and _is_like(p, parts[0])]
        storages = {part.storage for part in self._parts}
        if len(alike) < len(parts) or len(storages) > 1:
            return None
        if any(p.rows % PANEL_ROWS for p in alike[:-1]):
            return None

        def together(name: str) -> torch.Tensor | None:
            tensors = [getattr(p, name) for p in alike]
            return None if tensors[0] is None else torch.cat(tensors)

        data = together("data")
        assert data is not None
        rows = self.shape[0]
        return replace(
            alike[0], rows=rows, data=data, scales=together("scales"), mins=together("mins")
        )

    def way_back(self) -> WayBack:
        """Of a part: nothing is written of all of them together."""
        first = self._parts[0].way_back()
        return first.of_rows or first

    @property
    def _parts(self) -> list[QuantWeight]:
        return [cast(QuantWeight, part) for part in self.children()]

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self._parts)

    def check_finite(self) -> None:
        for part in self._parts:
            part.check_finite()

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([part.dequantize(dtype) for part in self._parts])  # [rows, columns]

    def select_rows(self, index: torch.Tensor) -> Self:
        rows = [self.row_range(row, row + 1) for row in index.tolist()]
        return type(self)(rows or [self._parts[0].select_rows(index)])

    def row_range(self, start: int, stop: int) -> Any:
        """The part itself where it is one; else a stack of what there is of each."""
        pieces = []
        for first, part in self._starts():
            a, b = max(start, first), min(stop, first + part.shape[0])
            if a < b:
                whole = b - a == part.shape[0]
                pieces.append(part if whole else part.row_range(a - first, b - first))
        return pieces[0] if len(pieces) == 1 else type(self)(pieces)

    def _starts(self) -> list[tuple[int, QuantWeight]]:
        starts, start = [], 0
        for part in self._parts:
            starts.append((start, part))
            start += part.shape[0]
        return starts

    def grouped_matmul(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Each group with its own part where the groups are the parts."""
        parts = self._parts
        if ends.numel() != len(parts):
            return super().grouped_matmul(x, ends)
        pieces = [parts[group].matmul(x[a:b]) for group, a, b in segments(ends)]
        return torch.cat(pieces) if pieces else x.new_empty((0, parts[0].shape[0]))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        for part in self._parts:
            part._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{len(self._parts)} parts, {self.shape[0]} × {self.shape[1]}"


def _is_like(packed: Packed, other: Packed | None) -> bool:
    """Whether the panels of both may stand below each other."""
    if other is None or (packed.kind, packed.zero_point) != (other.kind, other.zero_point):
        return False
    for name in ("scales", "mins"):
        mine, theirs = getattr(packed, name), getattr(other, name)
        if (mine is None) != (theirs is None):
            return False
        if mine is not None and (mine.dtype, mine.shape[1]) != (theirs.dtype, theirs.shape[1]):
            return False
    if packed.order is None or other.order is None:
        return packed.order is other.order
    return torch.equal(packed.order, other.order)
