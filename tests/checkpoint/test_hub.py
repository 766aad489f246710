"""Model names: what they lead to, how downloads go on after a break, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from fake_hub import COMMIT, FakeHub, serving
from qwenkit.checkpoint import hub as hub_module
from qwenkit.checkpoint import open_checkpoint, write_safetensors
from qwenkit.checkpoint.hub import pull, resolve
from qwenkit.checkpoint.progress import Progress
from qwenkit.errors import ModelNotFoundError, NetworkError

NAME = "Qwen/Tiny"
WEIGHTS = bytes(range(256)) * 4096
FILES = {
    "config.json": b'{"model_type": "qwen2"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "README.md": b"---\nlicense: apache-2.0\n---\n",
    "modeling_tiny.py": b"raise SystemExit('code of a repository was run')",
    "pytorch_model.bin": b"a pickle",
    "onnx/model.onnx": b"another format",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(hub_module, "FIRST_WAIT_S", 0.0)
    with serving(FakeHub(NAME, dict(FILES))) as served:
        yield served


def fetch(hub: FakeHub, cache: Path, name: str = NAME, **options: Any) -> Path:
    return resolve(name, cache_dir=cache, endpoint=hub.endpoint, **options)


def test_an_existing_path_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Qwen" / "Tiny").mkdir(parents=True)
    file = tmp_path / "model.gguf"
    file.touch()
    assert resolve(str(file)) == file
    monkeypatch.chdir(tmp_path)
    assert resolve(NAME) == Path(NAME)  # a folder of that name stands before the hub


def test_a_download_brings_what_a_model_needs_and_no_code(hub: FakeHub, tmp_path: Path) -> None:
    folder = fetch(hub, tmp_path)
    assert {f.name for f in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "README.md",
    }
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert not list(tmp_path.rglob("*.incomplete"))


def test_what_is_downloaded_opens_under_its_own_name(hub: FakeHub, tmp_path: Path) -> None:
    numbers = {"x": torch.zeros(3)}
    write_safetensors(tmp_path / "made.safetensors", numbers)
    hub.files["model.safetensors"] = (tmp_path / "made.safetensors").read_bytes()
    opened = open_checkpoint(fetch(hub, tmp_path / "cache"))
    assert opened.name == NAME
    assert opened.licence == "apache-2.0"
    assert set(opened.tensors) == {"x"}


def test_pickles_are_fetched_only_without_safetensors(hub: FakeHub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    hub.files["pytorch_model.bin.index.json"] = b'{"weight_map": {"x": "pytorch_model.bin"}}'
    folder = fetch(hub, tmp_path)
    assert (folder / "pytorch_model.bin").read_bytes() == b"a pickle"
    assert (folder / "pytorch_model.bin.index.json").is_file()


def test_what_is_cached_needs_no_hub(hub: FakeHub, tmp_path: Path) -> None:
    folder = fetch(hub, tmp_path)
    asked = len(hub.requests)
    assert fetch(hub, tmp_path) == folder
    assert fetch(hub, tmp_path, offline=True) == folder
    assert fetch(hub, tmp_path, offline=True, revision=COMMIT) == folder
    assert len(hub.requests) == asked


def test_the_cache_is_the_one_of_other_programs(hub: FakeHub, tmp_path: Path) -> None:
    folder = fetch(hub, tmp_path / "ours")
    found = huggingface_hub.snapshot_download(
        NAME, cache_dir=tmp_path / "ours", local_files_only=True
    )
    assert Path(found) == folder
    theirs = huggingface_hub.snapshot_download(
        NAME, cache_dir=tmp_path / "theirs", endpoint=hub.endpoint, allow_patterns=list(FILES)
    )
    assert fetch(hub, tmp_path / "theirs", offline=True) == Path(theirs)
    hub.requests.clear()
    assert pull(NAME, cache_dir=tmp_path / "theirs", endpoint=hub.endpoint) == Path(theirs)
    assert hub.ranges("model.safetensors") == []  # verified, not fetched again


def test_an_unfinished_snapshot_of_another_program_is_completed(
    hub: FakeHub, tmp_path: Path
) -> None:
    huggingface_hub.snapshot_download(
        NAME, cache_dir=tmp_path, endpoint=hub.endpoint, allow_patterns=["*.json"]
    )
    with pytest.raises(ModelNotFoundError, match="not in the cache"):
        fetch(hub, tmp_path, offline=True)
    assert (fetch(hub, tmp_path) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_broken_transfer_goes_on_where_it_stopped(hub: FakeHub, tmp_path: Path) -> None:
    hub.break_after["model.safetensors"] = [1000, 0, 500_000]
    seen: list[Progress] = []
    folder = fetch(hub, tmp_path, progress=seen.append)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors") == ["", "bytes=1000-", "bytes=1000-", "bytes=501000-"]
    last = [p for p in seen if p.file == "model.safetensors"][-1]
    assert last == Progress("model.safetensors", len(WEIGHTS), len(WEIGHTS))


def test_a_download_goes_on_in_a_later_process(hub: FakeHub, tmp_path: Path) -> None:
    hub.break_after["model.safetensors"] = [70_000, *[0] * 20]
    with pytest.raises(NetworkError, match=r"what was downloaded is kept.*chat default"):
        fetch(hub, tmp_path)
    with pytest.raises(ModelNotFoundError):
        fetch(hub, tmp_path, offline=True)  # half a model is none
    hub.break_after.clear()
    hub.requests.clear()
    assert (fetch(hub, tmp_path) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors") == ["bytes=70000-"]
    assert hub.ranges("tokenizer.json") == []


def test_a_hub_without_ranges_starts_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.ignores_ranges = True
    hub.break_after["model.safetensors"] = [70_000]
    assert (fetch(hub, tmp_path) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_damaged_part_is_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.break_after["model.safetensors"] = [70_000, *[0] * 20]
    with pytest.raises(NetworkError):
        fetch(hub, tmp_path)
    hub.break_after.clear()
    partial = next(tmp_path.rglob("*.incomplete"))
    partial.write_bytes(bytes(70_000))
    assert (fetch(hub, tmp_path) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_a_wrong_checksum_never_enters_the_cache(hub: FakeHub, tmp_path: Path, path: str) -> None:
    hub.served[path] = bytes(len(hub.files[path]))
    with pytest.raises(NetworkError, match=rf"{path}.*checksum"):
        fetch(hub, tmp_path)
    assert not (tmp_path / "models--Qwen--Tiny" / "blobs" / hub.checksum(path)).exists()
    hub.served.clear()
    assert (fetch(hub, tmp_path) / path).read_bytes() == hub.files[path]


def test_a_file_longer_than_announced_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.served["model.safetensors"] = WEIGHTS + b"!"
    with pytest.raises(NetworkError, match="more than the announced 1048576 bytes"):
        fetch(hub, tmp_path)


def test_pull_finds_and_mends_a_damaged_file(hub: FakeHub, tmp_path: Path) -> None:
    folder = fetch(hub, tmp_path)
    weights = (folder / "model.safetensors").resolve()
    weights.write_bytes(WEIGHTS[:-1] + b"?")
    hub.requests.clear()
    assert pull(NAME, cache_dir=tmp_path, endpoint=hub.endpoint) == folder
    assert weights.read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors") == [""]
    assert hub.ranges("tokenizer.json") == []


def test_gguf_repositories(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"tiny-q4_0.gguf": b"GGUF4", "tiny-q8_0.gguf": b"GGUF8", "config.json": b"{}"}
    with pytest.raises(ModelNotFoundError, match=r"Choose one.*Qwen/Tiny:tiny-q4_0\.gguf, Qwen"):
        fetch(hub, tmp_path)
    file = fetch(hub, tmp_path, f"{NAME}:tiny-q8_0.gguf")
    assert file.read_bytes() == b"GGUF8"
    assert fetch(hub, tmp_path, f"{NAME}:tiny-q8_0.gguf", offline=True) == file
    with pytest.raises(ModelNotFoundError, match=r"has no file 'other\.gguf'"):
        fetch(hub, tmp_path, f"{NAME}:other.gguf")
    del hub.files["tiny-q4_0.gguf"]
    assert fetch(hub, tmp_path / "one").name == "tiny-q8_0.gguf"


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        ((404, "RepoNotFound"), ModelNotFoundError, r"has no model 'Qwen/Tiny'"),
        ((401, ""), ModelNotFoundError, r"or it is private"),
        ((401, "GatedRepo"), ModelNotFoundError, r"licence was accepted"),
        ((404, "RevisionNotFound"), ModelNotFoundError, r"no revision 'main'"),
        ((500, ""), NetworkError, r"HTTP 500.*Without a hub.*chat default"),
    ],
)
def test_what_a_hub_refuses(
    hub: FakeHub, tmp_path: Path, status: tuple[int, str], error: type[Exception], words: str
) -> None:
    hub.status = status
    with pytest.raises(error, match=words):
        fetch(hub, tmp_path)


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>",
        b"[]",
        b'{"id": "Qwen/Tiny", "sha": "../../x", "siblings": []}',
        b'{"id": "../x", "sha": "' + COMMIT.encode() + b'", "siblings": []}',
        b'{"id": "Qwen/Tiny", "sha": "' + COMMIT.encode() + b'"}',
    ],
)
def test_an_answer_that_is_no_listing(hub: FakeHub, tmp_path: Path, answer: bytes) -> None:
    hub.answer = answer
    with pytest.raises(NetworkError, match="is no hub"):
        fetch(hub, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rfilename", "../../../escape.json"),
        ("rfilename", "/escape.json"),
        ("rfilename", "a\0.json"),
        ("rfilename", "..\\escape.json"),
        ("size", -1),
        ("size", True),
        ("size", "9"),
        ("blobId", "../../escape"),
        ("blobId", None),
    ],
)
def test_listed_files_that_could_leave_the_cache_are_left_out(
    hub: FakeHub, tmp_path: Path, key: str, value: object
) -> None:
    bad = {"rfilename": "escape.json", "size": 2, "blobId": "0" * 40} | {key: value}
    listing = {"id": NAME, "sha": COMMIT, "siblings": [*hub.siblings(), bad]}
    hub.answer = json.dumps(listing).encode()
    cache = tmp_path / "a" / "b" / "c" / "cache"
    fetch(hub, cache)
    outside = [p for p in tmp_path.rglob("*") if "escape" in p.name and cache not in p.parents]
    assert outside == []
    assert all("escape" not in asked for asked, _ in hub.requests)


def test_a_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(FakeHub()) as gone:
        pass
    with pytest.raises(NetworkError, match=r"cannot be reached.*qwenkit chat default") as caught:
        fetch(gone, tmp_path)
    assert "is kept" not in str(caught.value), "nothing was downloaded"


def test_a_redirect_never_leaves_encryption_for_a_file_or_another_scheme(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.redirect_to = "ftp://127.0.0.1/secret"
    with pytest.raises(NetworkError, match="not encrypted"):
        fetch(hub, tmp_path)


def test_an_address_that_is_no_hub_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"expected https://"):
        resolve(NAME, cache_dir=tmp_path, endpoint="file:///etc")


def test_a_name_unknown_to_the_hub_gets_a_suggestion(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"Did you mean 'Qwen/Qwen2-7B'"):
        fetch(hub, tmp_path, "qwen/qwen2-7b")


def test_an_adapter_is_fetched_like_a_model(tmp_path: Path) -> None:
    files = {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": WEIGHTS,
        "adapter_model.bin": b"a pickle",
        "README.md": b"",
    }
    with serving(FakeHub("Someone/Adapter", files)) as served:
        folder = fetch(served, tmp_path, "Someone/Adapter")
        names = {f.name for f in folder.iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        asked = len(served.requests)
        assert fetch(served, tmp_path, "Someone/Adapter") == folder  # cached whole
        assert len(served.requests) == asked
