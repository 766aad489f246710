"""Opening a model for a command, with something to watch meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenkit.cli import console

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
    with console.busy(f"Loading {name} / 正在加载模型 …") as show:
        from qwenkit.api import LLM  # torch takes seconds; the spinner already turns
        from qwenkit.checkpoint.hub import resolve
        from qwenkit.checkpoint.progress import Progress

        def show_bytes(progress: Progress) -> None:
            done, total = progress.done_bytes / 2**20, progress.total_bytes / 2**20
            show(f"{progress.file}: {done:.0f} of {total:.0f} MiB")

        resolve(name, offline=offline, progress=show_bytes)
        show(f"Loading {name} / 正在加载模型 …")
        return LLM(
            name,
            dtype=dtype,
            compute=compute,
            threads=threads,
            context_tokens=context,
            offline=offline,
        )
