"""Names on ModelScope and openMind: what their clients are asked, and what is made of it."""

from __future__ import annotations

import fnmatch
import inspect
import json
import logging
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from fake_hub import serving_with
from qwenkit import snapshot_download
from qwenkit.checkpoint import open_checkpoint
from qwenkit.checkpoint.client_hubs import ClientName, client_name
from qwenkit.checkpoint.hub import pull, resolve
from qwenkit.checkpoint.names import HubName
from qwenkit.checkpoint.progress import Progress
from qwenkit.errors import MissingDependencyError, ModelNotFoundError, NetworkError
from tiny import write_tiny_checkpoint

MODELSCOPE = "modelscope:qwen/Qwen-7B-Chat"
OPENMIND = "openmind:JiangSuAscend/Qwen1.5-7B-Chat"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PACKAGES = {MODELSCOPE: "modelscope", OPENMIND: "openmind_hub"}
both = pytest.mark.parametrize("name", [MODELSCOPE, OPENMIND])
NEVER = {
    "tf_model.h5": b"another framework's",
    "rust_model.ot": b"another framework's",
    "flax_model.msgpack": b"another framework's",
    "modeling_qwen.py": b"raise SystemExit('code of a repository was run')",
    "model-q4_0.gguf": b"GGUF",
}


class FakeClient(ModuleType):
    """A hub's client library that copies `files` into its cache; `failure` is raised instead."""

    def __init__(self, package: str, cache: Path, files: dict[str, bytes]) -> None:
        super().__init__(package)
        self.OM_HUB_CACHE = str(cache)
        self.cache, self.files = cache, files
        self.failure: Exception | None = None
        self.calls: list[dict[str, Any]] = []

    def snapshot_download(
        self, repository: str, *, revision: str | None = None, **options: Any
    ) -> str:
        self.calls.append({"repository": repository, "revision": revision, **options})
        owner, name = repository.split("/")
        cache = Path(options["cache_dir"] or self.cache)
        if self.__name__ == "modelscope":
            folder = cache / "models" / f"{owner}--{name}" / "snapshots" / (revision or "master")
            if options["local_files_only"]:
                if folder.is_dir():
                    return str(folder)
                raise LookupError("nothing cached")
        else:
            root = cache / f"models--{owner}--{name}"
            folder = root / "snapshots" / COMMIT
            (root / "refs").mkdir(parents=True, exist_ok=True)
            (root / "refs" / (revision or "main")).write_text(COMMIT)
        if self.failure is not None:
            raise self.failure
        folder.mkdir(parents=True, exist_ok=True)
        wanted, unwanted = options.get("allow_patterns"), options.get("ignore_patterns") or []
        for path, content in self.files.items():
            allowed = wanted is None or any(fnmatch.fnmatch(path, p) for p in wanted)
            if allowed and not any(fnmatch.fnmatch(path, p) for p in unwanted):
                (folder / path).write_bytes(content)
                for report in options.get("progress_callbacks") or []:
                    told = report(path, len(content))
                    told.update(len(content))
                    told.end()
        return str(folder)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    made = write_tiny_checkpoint(tmp_path / "made")
    return {path.name: path.read_bytes() for path in made.iterdir()} | NEVER


@pytest.fixture
def clients(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]
) -> dict[str, FakeClient]:
    """Both libraries, with a cache below the test's own folder."""
    made = {}
    for name, package in PACKAGES.items():
        made[name] = FakeClient(package, tmp_path / package, files)
        monkeypatch.setitem(sys.modules, package, made[name])
    return made


def test_names_with_a_prefix_and_names_without() -> None:
    assert client_name(MODELSCOPE) == ClientName("modelscope", HubName("qwen", "Qwen-7B-Chat"))
    assert str(client_name("openmind:a/b:c.gguf")) == "openmind:a/b:c.gguf"
    for other in ("Qwen/Qwen2-0.5B", "a/b:c.gguf", "modelscope", "default"):
        assert client_name(other) is None
    for wrong in ("modelscope:", "openmind:Qwen", "modelscope:a/../b"):
        with pytest.raises(ModelNotFoundError, match="no hub name of the form"):
            client_name(wrong)
    with pytest.raises(ModelNotFoundError, match="revision 'a b'"):
        resolve(MODELSCOPE, revision="a b")


@both
def test_without_its_library_a_hub_names_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    extra = name.partition(":")[0]
    said = rf"needs the package '{PACKAGES[name]}'\. Install it with: pip install 'qwenkit\[{extra}"
    for ask in (resolve, pull, snapshot_download):
        with pytest.raises(MissingDependencyError, match=said):
            ask(name)


@both
def test_a_download_brings_what_a_model_needs_and_no_code(
    name: str, clients: dict[str, FakeClient], files: dict[str, bytes]
) -> None:
    folder = resolve(name, revision="v1.0.5")
    assert {path.name for path in folder.iterdir()} == set(files) - set(NEVER)
    (call,) = [c for c in clients[name].calls if not c.get("local_files_only")]
    assert call["repository"] == name.partition(":")[2]
    assert call["revision"] == "v1.0.5"
    assert {"*.h5", "*.ot", "*.msgpack", "*.py"} <= set(call["ignore_patterns"])
    opened = open_checkpoint(folder)
    assert opened.name == name.partition(":")[2]


@both
def test_what_is_cached_needs_no_hub(name: str, clients: dict[str, FakeClient]) -> None:
    with pytest.raises(ModelNotFoundError, match=rf"not whole in the cache.*'qwenkit pull {name}'"):
        resolve(name, offline=True)
    folder = resolve(name)
    clients[name].failure = ConnectionError("no network")
    assert resolve(name) == resolve(name, offline=True) == folder
    assert snapshot_download(name) == str(folder)
    with pytest.raises(NetworkError, match=r"ConnectionError: no network.*is kept"):
        pull(name)


@both
def test_pickles_are_fetched_only_without_safetensors(
    name: str, clients: dict[str, FakeClient], files: dict[str, bytes]
) -> None:
    files["pytorch_model.bin"] = b"a pickle"
    assert not (resolve(name) / "pytorch_model.bin").exists()
    del files["model.safetensors"]
    (resolve(name) / "model.safetensors").unlink()
    assert (resolve(name) / "pytorch_model.bin").read_bytes() == b"a pickle"


@both
def test_one_gguf_file_of_several(name: str, clients: dict[str, FakeClient]) -> None:
    file = resolve(f"{name}:model-q4_0.gguf")
    assert file.read_bytes() == b"GGUF"
    assert [path.name for path in file.parent.iterdir()] == ["model-q4_0.gguf"]
    assert resolve(f"{name}:model-q4_0.gguf", offline=True) == file
    with pytest.raises(ModelNotFoundError, match=r"none\.gguf is not there"):
        resolve(f"{name}:none.gguf")


@both
def test_a_repository_of_gguf_files_alone_asks_for_one(
    name: str, clients: dict[str, FakeClient], files: dict[str, bytes]
) -> None:
    for path in set(files) - {"model-q4_0.gguf"}:
        del files[path]
    with pytest.raises(ModelNotFoundError, match=r"config\.json, model\.safetensors is missing"):
        resolve(name)


@both
def test_a_pointer_of_git_lfs_is_no_model(
    name: str, clients: dict[str, FakeClient], files: dict[str, bytes]
) -> None:
    whole = files["qwen.tiktoken"]
    files["qwen.tiktoken"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    with pytest.raises(ModelNotFoundError, match=r"qwen\.tiktoken: .*git-LFS pointer"):
        resolve(name)
    files["qwen.tiktoken"] = whole
    assert (resolve(name) / "qwen.tiktoken").read_bytes() == whole, "fetched again, not used"


def test_modelscope_tells_how_far_it_is(
    clients: dict[str, FakeClient], files: dict[str, bytes]
) -> None:
    seen: list[Progress] = []
    resolve(MODELSCOPE, progress=seen.append)
    size = len(files["model.safetensors"])
    assert Progress("model.safetensors", size, size) in seen


class _StatusError(Exception):
    status_code = 404


@both
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_is_not_there(
    name: str, wrapped: bool, clients: dict[str, FakeClient]
) -> None:
    failure: Exception = _StatusError("no such model")
    if wrapped:
        failure = RuntimeError("failed after 10 attempts")
        failure.__cause__ = _StatusError("no such model")
    clients[name].failure = failure
    with pytest.raises(ModelNotFoundError, match=r"has no model '.*' at the revision 'v9'"):
        resolve(name, revision="v9")


@both
def test_the_real_library_takes_what_it_is_given(
    name: str, tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pytest.importorskip(PACKAGES[name], reason="comes with the extra of this hub")
    fake = FakeClient(PACKAGES[name], tmp_path / "cache", files)
    monkeypatch.setitem(sys.modules, PACKAGES[name], fake)
    resolve(name, revision="v1.0.5", progress=lambda step: None, endpoint="https://x.org")
    for call in fake.calls:
        inspect.signature(real.snapshot_download).bind(call.pop("repository"), **call)
    assert name == MODELSCOPE or Path(real.OM_HUB_CACHE).is_absolute()


class _ModelScope(BaseHTTPRequestHandler):
    """As much of ModelScope's interface as its client uses for a download."""

    files: dict[str, bytes]
    asked: list[str]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        self.asked.append(query.get("FilePath", address.path))
        if address.path == "/api/v1/models/qwen/Qwen-7B-Chat/repo/files":
            listed = [
                {"Path": path, "Name": path, "Type": "blob", "Size": len(content)}
                for path, content in self.files.items()
            ]
            self._send(200, json.dumps({"Code": 200, "Data": {"Files": listed}}).encode())
        elif query.get("FilePath") in self.files and query["Revision"] == "v1.0.5":
            self._send(200, self.files[query["FilePath"]])
        else:
            self._send(404, b'{"Code": 10010205001, "Message": "not found"}')

    def _send(self, code: int, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def modelscope_server(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    handler = type("Handler", (_ModelScope,), {"files": files, "asked": asked})
    with serving_with(handler) as endpoint:
        yield endpoint, asked


@pytest.mark.filterwarnings("default")
def test_the_real_modelscope_client_against_a_server(
    modelscope_server: tuple[str, list[str]],
    tmp_path: Path,
    files: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("modelscope", reason="comes with the extra modelscope")
    caplog.set_level(logging.CRITICAL)
    endpoint, asked = modelscope_server
    seen: list[Progress] = []
    where: dict[str, Any] = {"cache_dir": tmp_path / "cache", "endpoint": endpoint}
    with pytest.raises(ModelNotFoundError, match="not whole in the cache"):
        resolve(MODELSCOPE, revision="v1.0.5", offline=True, **where)
    assert asked == []
    folder = resolve(MODELSCOPE, revision="v1.0.5", progress=seen.append, **where)
    assert {p.name for p in folder.iterdir() if p.is_file()} >= set(files) - set(NEVER)
    assert not set(NEVER) & set(asked)
    size = len(files["model.safetensors"])
    assert Progress("model.safetensors", size, size) in seen
    assert open_checkpoint(folder).name == "qwen/Qwen-7B-Chat"
    count = len(asked)
    assert resolve(MODELSCOPE, revision="v1.0.5", offline=True, **where) == folder
    assert resolve(MODELSCOPE, revision="v1.0.5", **where) == folder
    assert len(asked) == count
    with pytest.raises(ModelNotFoundError, match="ModelScope has no model 'qwen/None'"):
        resolve("modelscope:qwen/None", revision="v1.0.5", **where)
