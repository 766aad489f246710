"""An importance matrix, computed as llama-imatrix does: of every matrix of the decoder layers the
squares of what came into each column, summed over the tokens of some text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from qwenkit.checkpoint.imatrix import ColumnSquares, Imatrix
from qwenkit.errors import NonFiniteError, UsageError
from qwenkit.kernels.ops.grouped_matmul import segments
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.models.published import gguf_layout
from qwenkit.quantize.anatomy import Feed, layer_parts
from qwenkit.quantize.observe import Watch
from qwenkit.quantize.stream import LayerSource, batches


def compute_imatrix(
    source: LayerSource,
    rows: Sequence[Sequence[int]],
    *,
    dataset: str = "",
    progress: Callable[[float], None] | None = None,
) -> Imatrix:
    """Run the rows of ids through the model, layer by layer and each from its own beginning.

    `dataset` names the text in the result. What passes between layers is held as bf16. `progress`
    is told the share done. Raises UsageError without rows, NonFiniteError naming the matrix that
    numbers came into which are none.
    """
    if not rows:
        raise UsageError("calibrate: there is no row of two tokens.")
    names: dict[tuple[str, str], list[str]] = {}
    for slot in gguf_layout(source.skeleton, source.architecture):
        if slot.is_matrix:
            names.setdefault((slot.path, slot.part), []).append(slot.name)
    parts = batches([len(row) for row in rows])
    flow = [x.bfloat16() for x in source.embedded(rows)]
    entries: dict[str, ColumnSquares] = {}
    with torch.inference_mode():
        for number in range(source.layer_count):
            layer, _ = source.layer(number)
            squares = _Squares()
            for index, batch in enumerate(parts):
                x = flow[index].float()
                for part in layer_parts(layer, source.anatomy):
                    x = Watch(part).run(x, source.context(batch.lengths), squares.take)
                flow[index] = x.bfloat16()
                if progress is not None:
                    done = number + (index + 1) / len(parts)
                    progress(done / source.layer_count)
            for path, found in squares.found.items():
                whole = f"{source.layer_path(number)}.{path}"
                if not bool(found.sums.isfinite().all()):
                    raise NonFiniteError(f"{whole}: what comes into it is NaN or infinite.")
                entries |= dict.fromkeys(names[whole, "weight"], found)
    longest = max(len(row) for row in rows)
    datasets = (dataset,) if dataset else ()
    return Imatrix(entries, datasets=datasets, chunks=len(rows), chunk_tokens=longest)


class _Squares:
    """The sums of one layer, by the paths of its matrices below it."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}

    def take(self, feed: Feed, x: torch.Tensor, ends: torch.Tensor | None) -> None:
        """What a feed reads, [rows, columns]; of experts sorted as `ends` says."""
        path = next(iter(feed.matrices))
        count = _matrices(feed.first)
        if path not in self._sums:
            self._sums[path] = torch.zeros(count, x.shape[1], dtype=torch.float64)
            self._counts[path] = torch.zeros(count)
        pieces = [(0, 0, len(x))] if ends is None else list(segments(ends))
        for matrix, start, stop in pieces:
            self._sums[path][matrix] += x[start:stop].double().square().sum(0)
            self._counts[path][matrix] += stop - start
        for other in feed.matrices:
            self._sums[other], self._counts[other] = self._sums[path], self._counts[path]

    @property
    def found(self) -> dict[str, ColumnSquares]:
        """All of them, in fp32."""
        return {
            path: ColumnSquares(sums.float(), self._counts[path].clone())
            for path, sums in self._sums.items()
        }


def _matrices(matrix: nn.Module) -> int:
    return matrix.groups if isinstance(matrix, GroupedLinear) else 1
