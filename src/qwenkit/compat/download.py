"""`snapshot_download` as the hubs' snippets use it."""

from __future__ import annotations

from collections.abc import Sequence

from qwenkit.checkpoint.hub import resolve


def snapshot_download(
    repo_id: str,
    *,
    revision: str | None = None,
    ignore_patterns: Sequence[str] | None = None,
    resume_download: bool | None = None,
) -> str:
    """The local folder (or .gguf file) of a model, downloaded if need be.

    Only what a model needs is ever downloaded, so `ignore_patterns` has nothing to leave out, and
    downloads always resume; both are accepted. Raises ModelNotFoundError or NetworkError.
    """
    return str(resolve(repo_id, revision=revision))
