"""Opening a model for a command, with something to watch meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenkit.cli import console, download

if TYPE_CHECKING:
    from qwenkit.api import LLM


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    compute: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    offline: bool = False,
) -> LLM:
    """Find (or download) and load a model. Raises what `qwenkit.api.LLM` raises."""
    from qwenkit.checkpoint.hub import resolve  # a tenth of a second that --help does without

    with download.bars() as progress:
        resolve(name, offline=offline, progress=progress)
    with console.busy(f"Loading {name} / 正在加载模型 …"):
        from qwenkit.api import LLM  # torch takes seconds; the spinner already turns

        return LLM(
            name,
            dtype=dtype,
            compute=compute,
            threads=threads,
            context_tokens=context,
            offline=offline,
        )
