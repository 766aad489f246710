"""Opening a model for a command, with something to watch meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenkit.cli import console, download, options
from qwenkit.errors import UsageError
from qwenkit.types.extension import ROPE_MODES

if TYPE_CHECKING:
    from qwenkit.api import LLM

_OPTIONS = {
    "context_tokens": "--context",
    "kv_cache_tokens": "--context",
    "threads": "--threads",
    "rope": "--rope",
    "dtype": "--dtype",
    "compute": "--compute",
}


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    compute: str = "auto",
    threads: int | None = None,
    pin_threads: bool = False,
    context: int | None = None,
    rope: str = "per-request",
    offline: bool = False,
) -> LLM:
    """Find (or download) and load a model.

    Raises what `qwenkit.api.LLM` raises, with the names of the command line's options.
    """
    options.check_name("--dtype", dtype, options.DTYPES)
    options.check_name("--compute", compute, options.COMPUTE)
    options.check_name("--rope", rope, ROPE_MODES)
    from qwenkit.checkpoint.hub import resolve  # a tenth of a second that --help does without

    with download.bars() as progress:
        resolve(name, offline=offline, progress=progress)
    with console.busy(f"Loading {name} / 正在加载模型 …"):
        from qwenkit.api import LLM  # torch takes seconds; the spinner already turns

        try:
            return LLM(
                name,
                dtype=dtype,
                compute=compute,
                threads=threads,
                pin_threads=pin_threads,
                context_tokens=context,
                rope=rope,
                offline=offline,
            )
        except UsageError as error:
            setting, _, message = str(error).partition(":")
            if setting not in _OPTIONS:
                raise
            raise UsageError(f"{_OPTIONS[setting]}:{message}") from error
