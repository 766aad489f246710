r"""Our server with a fault in it that a signal sets off: the engine's thread dies, or hangs.

    python -m qwenkit.bench.reliability.faulty_server serve MODEL …

SIGUSR1 makes the engine's thread raise at its next step, outside of what it expects to fail;
SIGUSR2 makes it wait for ever there.
"""

from __future__ import annotations

import runpy
import signal
import sys
import time
from types import FrameType

from qwenkit.engine.engine import Engine

_ordered: list[int] = []


def _has_work(engine: Engine) -> bool:
    while signal.SIGUSR2 in _ordered:
        time.sleep(1.0)
    if _ordered:
        raise RuntimeError("a fault that was put in on purpose")
    return bool(_had_work(engine))


def _order(number: int, frame: FrameType | None) -> None:
    _ordered.append(number)


_had_work = Engine.has_work.fget  # type: ignore[attr-defined]


def main() -> None:
    """Put the fault in, then be the program `qwenkit`."""
    Engine.has_work = property(_has_work)  # type: ignore[method-assign, assignment]
    signal.signal(signal.SIGUSR1, _order)
    signal.signal(signal.SIGUSR2, _order)
    sys.argv[0] = "qwenkit"
    runpy.run_module("qwenkit", run_name="__main__")


if __name__ == "__main__":
    main()
