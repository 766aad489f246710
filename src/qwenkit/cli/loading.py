"""Opening a model for a command, with something to watch meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qwenkit.cli import console, download, options
from qwenkit.errors import UsageError
from qwenkit.types.extension import ROPE_MODES

if TYPE_CHECKING:
    from qwenkit.api import LLM

_OPTIONS = {
    "context_tokens": "--context",
    "kv_cache_tokens": "--context",
    "kv_dtype": "--kv-dtype",
    "threads": "--threads",
    "rope": "--rope",
    "dtype": "--dtype",
    "weights": "--weights",
    "group_size": "--group-size",
    "head_weights": "--head-weights",
    "compute": "--compute",
}


def load_model(name: str, given: options.ModelOptions | None = None) -> LLM:
    """Find (or download) and load a model.

    Raises what `qwenkit.api.LLM` raises, with the names of the command line's options.
    """
    given = given or options.ModelOptions()
    _check(given)
    from qwenkit.checkpoint.hub import resolve  # a tenth of a second that --help does without

    with download.bars() as progress:
        resolve(name, offline=given.offline, progress=progress)
    with console.progress(f"Loading {name} / 正在加载模型 …") as show, _options_named():
        from qwenkit.api import LLM  # torch takes seconds; something moves already

        return LLM(
            name,
            dtype=given.dtype,
            weights=given.weights,
            group_size=given.group_size,
            head_weights=given.head_weights,
            compute=given.compute,
            threads=given.threads,
            pin_threads=given.pin_threads,
            context_tokens=given.context,
            kv_dtype=given.kv_dtype,
            rope=given.rope,
            offline=given.offline,
            progress=show,
        )


def _check(given: options.ModelOptions) -> None:
    """Raises UsageError for what can be known to be wrong before anything is downloaded."""
    options.check_name("--dtype", given.dtype, options.DTYPES)
    options.check_name("--compute", given.compute, options.COMPUTE)
    options.check_name("--kv-dtype", given.kv_dtype, options.KV_DTYPES)
    options.check_name("--rope", given.rope, ROPE_MODES)
    if (given.weights, given.group_size, given.head_weights) != ("auto", None, None):
        from qwenkit.formats.plan import WeightPlan  # imports torch

        with _options_named():
            WeightPlan(given.weights, given.group_size, given.head_weights)


@contextmanager
def _options_named() -> Iterator[None]:
    """Errors that begin with the name of a setting begin with that of its option instead."""
    try:
        yield
    except UsageError as error:
        setting, _, message = str(error).partition(":")
        if setting not in _OPTIONS:
            raise
        raise UsageError(f"{_OPTIONS[setting]}:{message}") from error
