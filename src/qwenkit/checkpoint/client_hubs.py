"""Hubs that are reached through their own client libraries: ModelScope and openMind (Modelers).

`modelscope:qwen/Qwen-7B-Chat` and `openmind:JiangSuAscend/Qwen1.5-7B-Chat` are names on them. The
libraries keep their own caches, settings and tokens, resume downloads and check what they fetch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from qwenkit.checkpoint.hub_cache import cached_snapshot
from qwenkit.checkpoint.members import refuse_lfs_pointer
from qwenkit.checkpoint.names import HubName, check_revision, parse_hub_name
from qwenkit.checkpoint.progress import Progress, ProgressCallback
from qwenkit.checkpoint.repository import missing_files
from qwenkit.errors import (
    CheckpointError,
    MissingDependencyError,
    ModelNotFoundError,
    NetworkError,
)

# Never fetched: other frameworks' weights, code, and GGUF files that were not named. Pickles only
# where there are no safetensors.
IGNORED = ("*.h5", "*.ot", "*.msgpack", "*.onnx", "*.py", "*.gguf")
PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth")


@dataclass(frozen=True, slots=True)
class ClientName:
    """A repository of the hub with this prefix, which its client library also is an extra of."""

    hub: str
    name: HubName

    def __str__(self) -> str:
        return f"{self.hub}:{self.name}"


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a client; None: what the library does by itself."""

    wanted: ClientName
    revision: str | None = None
    progress: ProgressCallback | None = None
    cache_dir: Path | None = None
    endpoint: str | None = None

    @property
    def name(self) -> HubName:
        return self.wanted.name


def client_name(name: str) -> ClientName | None:
    """`hub:organisation/name` of a hub with a client; None for names without such a prefix.

    Raises ModelNotFoundError for what comes after the prefix if it is no hub name.
    """
    hub, colon, rest = name.partition(":")
    return ClientName(hub, parse_hub_name(rest)) if colon and hub in _CLIENTS else None


def fetch(request: Request, *, offline: bool = False, newest: bool = False) -> Path:
    """The local folder, or GGUF file, of a model on such a hub; `newest` asks the hub in any case.

    Raises MissingDependencyError without the client library, ModelNotFoundError when the hub has no
    such model or `offline` finds none, NetworkError for what goes wrong in between.
    """
    wanted = request.wanted
    if request.revision is not None:
        check_revision(request.revision)
    client = _CLIENTS[wanted.hub]
    try:
        library = importlib.import_module(client.package)
    except ImportError as error:
        purpose = f"Fetching {str(wanted)!r}"
        raise MissingDependencyError(client.package, wanted.hub, purpose) from error
    cached = None if newest else client.cached(library, request)
    if cached is not None and _missing(cached) is None:
        return cached
    if offline:
        raise ModelNotFoundError(
            f"{wanted} ({request.revision or 'newest'}) is not whole in the cache of "
            f"{client.package}, and only local files may be used. Fetch it with 'qwenkit pull "
            f"{wanted}'."
        )
    try:
        path = client.download(library, request)
    except Exception as error:  # a library's errors are its own, of many kinds
        _refuse(error, wanted, request.revision)
    missing = _missing(path)
    if missing is not None:
        raise ModelNotFoundError(f"{wanted} was fetched to {path}, but {missing}")
    return path


def _missing(path: Path) -> str | None:
    """What keeps a folder, or a GGUF file, from being a whole model; None: nothing."""
    if not path.exists():
        return f"{path.name} is not there."
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    try:
        for file in files:
            refuse_lfs_pointer(file)
    except CheckpointError as error:
        return str(error)
    if path.is_file():
        return None
    absent = [] if (path / "config.json").is_file() else ["config.json"]
    absent += missing_files(path)
    if not absent:
        return None
    return (
        f"{', '.join(absent[:5])} is missing. Of a repository with GGUF files name one: "
        "hub:organisation/name:file.gguf."
    )


def _download(request: Request, snapshot: Callable[..., str]) -> Path:
    """Call a library's `snapshot_download` for what a model needs of a repository."""
    if request.name.file is not None:
        return Path(snapshot(allow_patterns=[request.name.file])) / request.name.file
    folder = Path(snapshot(ignore_patterns=[*IGNORED, *PICKLES]))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot(ignore_patterns=list(IGNORED)))
    return folder


def _modelscope(library: ModuleType, request: Request, *, local_files_only: bool) -> Any:
    def snapshot(**patterns: list[str]) -> str:
        folder: str = library.snapshot_download(
            request.name.repository,
            revision=request.revision,
            cache_dir=None if request.cache_dir is None else str(request.cache_dir),
            local_files_only=local_files_only,
            progress_callbacks=None if request.progress is None else [_reporter(request.progress)],
            endpoint=request.endpoint,
            **patterns,
        )
        return folder

    return snapshot


def _download_from_modelscope(library: ModuleType, request: Request) -> Path:
    return _download(request, _modelscope(library, request, local_files_only=False))


def _cached_by_modelscope(library: ModuleType, request: Request) -> Path | None:
    try:
        folder = Path(_modelscope(library, request, local_files_only=True)())
    except Exception:  # an error of the library's own, by which it says that there is nothing
        return None
    return folder if request.name.file is None else folder / request.name.file


def _reporter(progress: ProgressCallback) -> type:
    """As ModelScope's `ProgressCallback`: made for each file, told of bytes as they come."""

    class Reporter:
        def __init__(self, filename: str, file_size: int) -> None:
            self._file, self._total_bytes, self._done_bytes = filename, file_size, 0

        def update(self, size: int) -> None:
            self._done_bytes += size
            progress(Progress(self._file, self._done_bytes, self._total_bytes))

        def end(self) -> None:
            pass

    return Reporter


def _download_from_openmind(library: ModuleType, request: Request) -> Path:
    def snapshot(**patterns: list[str]) -> str:
        folder: str = library.snapshot_download(
            request.name.repository,
            revision=request.revision,
            cache_dir=request.cache_dir,
            endpoint=request.endpoint,
            **patterns,
        )
        return folder

    return _download(request, snapshot)  # the library draws bars of its own


def _cached_by_openmind(library: ModuleType, request: Request) -> Path | None:
    """Its cache has the layout of Hugging Face's; asked itself, the library goes to the network."""
    cache = request.cache_dir or Path(library.OM_HUB_CACHE)
    return cached_snapshot(request.name, request.revision or "main", cache)


@dataclass(frozen=True, slots=True)
class _Client:
    package: str
    title: str
    download: Callable[[ModuleType, Request], Path]
    cached: Callable[[ModuleType, Request], Path | None]


_CLIENTS = {
    "modelscope": _Client(
        "modelscope", "ModelScope", _download_from_modelscope, _cached_by_modelscope
    ),
    "openmind": _Client("openmind_hub", "openMind", _download_from_openmind, _cached_by_openmind),
}


def _refuse(error: Exception, wanted: ClientName, revision: str | None) -> NoReturn:
    title = _CLIENTS[wanted.hub].title
    at = "" if revision is None else f" at the revision {revision!r}"
    statuses = [s for s in map(_status, _causes(error)) if s is not None]
    if any(status in (401, 403, 404) for status in statuses):
        raise ModelNotFoundError(
            f"{title} has no model {wanted.name.repository!r}{at}, or it is private: {error}"
        ) from error
    raise NetworkError(
        f"{wanted}{at} could not be fetched from {title} ({type(error).__name__}: {error}). What "
        f"was downloaded is kept; try 'qwenkit pull {wanted}' again."
    ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception of a client library carries."""
    answer = getattr(error, "response", None)
    found = getattr(error, "status_code", None) or getattr(answer, "status_code", None)
    return found if isinstance(found, int) else None
