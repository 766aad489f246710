"""What the machine gives at this moment: read bandwidth and fp32 products, both at all threads.

The measuring machines are shared, so a figure stands beside the calibration before and after it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

_BUFFER_BYTES = 256 << 20  # far above any cache
_MATRIX_SIDE = 1024
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Calibration:
    """Best of a few tries: gigabytes read per second, billions of fp32 operations per second."""

    read_gb_per_s: float
    compute_gflop_per_s: float

    def moved(self, later: Calibration) -> float:
        """The larger relative change of the two readings, 0.1 being 10 %."""
        return max(
            abs(later.read_gb_per_s / self.read_gb_per_s - 1),
            abs(later.compute_gflop_per_s / self.compute_gflop_per_s - 1),
        )


class Calibrator:
    """Keeps its buffers, so that a reading costs a fraction of a second."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._buffer = torch.zeros(_BUFFER_BYTES // 8, dtype=torch.int64)
        self._matrix = torch.rand(_MATRIX_SIDE, _MATRIX_SIDE)

    def read(self) -> Calibration:
        """One reading."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            read_s = min(self._time(self._buffer.sum) for _ in range(_REPEATS))
            product_s = min(
                self._time(lambda: self._matrix @ self._matrix) for _ in range(_REPEATS)
            )
        finally:
            torch.set_num_threads(before)
        return Calibration(_BUFFER_BYTES / read_s / 1e9, 2 * _MATRIX_SIDE**3 / product_s / 1e9)

    @staticmethod
    def _time(work: object) -> float:
        assert callable(work)
        start_s = time.perf_counter()
        work()
        return time.perf_counter() - start_s
