"""How a request's text becomes one vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qwenkit.errors import RequestError, suggest

Pooling = Literal["last", "mean"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingParams:
    """`pooling` "last" takes the hidden state of the last token, "mean" the mean of all tokens';
    `normalize` gives the vector length one.

    Raises RequestError naming the field on construction.
    """

    pooling: Pooling = "last"
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise RequestError(
                "pooling", f"got {self.pooling!r}. {suggest(self.pooling, POOLINGS)}"
            )
        if not isinstance(self.normalize, bool):
            raise RequestError("normalize", f"expected true or false, got {self.normalize!r}.")
