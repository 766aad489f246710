"""How a download tells the one who waits how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one file is: bytes of it that are done, of all that it has."""

    file: str
    done_bytes: int
    total_bytes: int


ProgressCallback = Callable[[Progress], None]
