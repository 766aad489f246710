"""Hidden states of a prompt, coming chunk by chunk, to one vector."""

from __future__ import annotations

import torch

from qwenkit.errors import NonFiniteError
from qwenkit.types.embedding import EmbeddingParams


class Pooler:
    """Takes the rows of one sequence in the order of their positions and pools them.

    The mean is a running sum in fp64, one row after another: the same bits however the rows are cut
    into chunks. Rows that were taken already, as after a preemption, are passed over.
    """

    def __init__(self, params: EmbeddingParams) -> None:
        self._params = params
        self._tokens = 0  # whose rows are in the sum
        self._sum: torch.Tensor | None = None  # fp64 [hidden_size]
        self._last: torch.Tensor | None = None  # [hidden_size]

    def add(self, first: int, rows: torch.Tensor) -> None:
        """Take rows [tokens, hidden_size] of the positions from `first` on.

        For a mean none may be left out; for the last token only the last call counts.
        """
        self._last = rows[-1].clone()
        if self._params.pooling != "mean":
            return
        if first > self._tokens:
            raise RuntimeError(f"rows from {first} on came while {self._tokens} had been pooled")
        fresh = rows[self._tokens - first :].double().cpu()  # [fresh tokens, hidden_size]
        if len(fresh):
            start = torch.zeros_like(fresh[:1]) if self._sum is None else self._sum[None]
            self._sum = torch.cat((start, fresh)).cumsum(0)[-1].clone()
            self._tokens += len(fresh)

    def result(self) -> tuple[float, ...]:
        """The vector as fp32 numbers. Raises NonFiniteError when one of them is none."""
        assert self._last is not None, "no rows have come"
        vector = self._last.double().cpu()
        if self._params.pooling == "mean":
            assert self._sum is not None
            vector = self._sum / self._tokens
        if not vector.isfinite().all():
            raise NonFiniteError(
                "The hidden states of this text are NaN or infinite, so it has no embedding. "
                "Weights that overflow the compute dtype are the usual cause; try float32."
            )
        if self._params.normalize:
            length = vector.square().sum().sqrt()
            vector = vector / length if length > 0 else vector
        return tuple(vector.float().tolist())
