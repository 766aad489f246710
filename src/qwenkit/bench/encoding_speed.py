"""How many megabytes of text a second are encoded, beside other packages over the same vocabulary:
in turns, after one that is not measured, as medians; whether the ids are the same.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qwenkit.bench.encoders import Encoder


@dataclass(frozen=True, slots=True)
class EncodingSpeed:
    """One tokenizer: MB (10⁶ bytes) per second of each turn, and whether its ids are those of the
    first.
    """

    name: str
    turns: tuple[float, ...]
    same_ids: bool

    @property
    def median(self) -> float:
        """Of the turns, in MB/s."""
        return statistics.median(self.turns)

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return dataclasses.asdict(self) | {"mb_per_s": self.median}


def measure_encoding(
    encoders: Sequence[Encoder],
    text: str,
    *,
    turns: int = 5,
    progress: Callable[[str, float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[EncodingSpeed]:
    """Encode `text` with each of `encoders`, one after the other, `turns` times; `clock` is in
    seconds.
    """
    size_mb = len(text.encode()) / 1e6
    rates: list[list[float]] = [[] for _ in encoders]
    warm = [list(encoder.encode(text)) for encoder in encoders]
    for turn in range(turns):
        for index, encoder in enumerate(encoders):
            start_s = clock()
            encoder.encode(text)
            rates[index].append(size_mb / (clock() - start_s))
            if progress is not None:
                progress(encoder.name, (turn * len(encoders) + index + 1) / turns / len(encoders))
    return [
        EncodingSpeed(encoder.name, tuple(rate), ids == warm[0])
        for encoder, rate, ids in zip(encoders, rates, warm, strict=True)
    ]
