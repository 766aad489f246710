"""What is a model name and what is not: a refused one opens and connects to nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub.constants  # noqa: F401 - its import is no business of the name's
import pytest

from qwenkit.checkpoint.hub import pull, resolve
from qwenkit.checkpoint.names import WELL_KNOWN, HubName, parse_hub_name
from qwenkit.errors import ModelNotFoundError


@pytest.mark.parametrize("name", WELL_KNOWN)
def test_well_known_names_are_names(name: str) -> None:
    parsed = parse_hub_name(name)
    assert parsed.repository == str(parsed) == name


def test_a_name_may_pick_a_file() -> None:
    parsed = parse_hub_name("Qwen/Qwen2-0.5B-Instruct-GGUF:q4/qwen2-0_5b.gguf")
    assert parsed == HubName("Qwen", "Qwen2-0.5B-Instruct-GGUF", "q4/qwen2-0_5b.gguf")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Qwen2-0.5B", "Did you mean 'Qwen/Qwen2-0.5B'?"),
        ("qwen2-7b-instruct", "Did you mean 'Qwen/Qwen2-7B-Instruct'?"),
        ("Qwen2-0.5B-Instuct", "'Qwen/Qwen2-0.5B-Instruct'"),
        ("SmolLM2-135M-Instruct", "'HuggingFaceTB/SmolLM2-135M-Instruct'"),
        ("defualt", "Did you mean 'default'?"),
        ("zzzz", "or 'default' for the embedded model"),
    ],
)
def test_a_misspelt_name_gets_a_suggestion(tmp_path: Path, name: str, meant: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(name, cache_dir=tmp_path)
    assert meant in str(caught.value)


NO_NAMES = [
    "",
    "\0",
    "Qwen/Tiny\0",
    "\0/etc/passwd",
    "Qwen/Tiny:a\0.gguf",
    "Qwen/\ud800",
    "Qwen/Tiny\n",
    "Qwen/ Tiny",
    "../Tiny",
    "../../etc/none",
    "Qwen/../../none",
    "Qwen/..",
    "../..none",
    "Qwen/.none",
    ".none/Tiny",
    "Qwen/Tiny/../none",
    "Qwen/a..b",
    "Qwen/a--b",
    "/none/Tiny",
    "//none/Tiny",
    "/proc/self/none",
    "~none-such-user/Tiny",
    "C:\\none",
    "..\\..\\none",
    "Qwen\\Tiny",
    "\\\\host\\share",
    "file:///etc/none",
    "file://localhost/etc/none",
    "file:/etc/none",
    "http://169.254.169.254/latest/meta-data",
    "http://127.0.0.1:1/Qwen/Tiny",
    "https://example.org/Qwen/Tiny",
    "ftp://example.org/x",
    "//example.org/x",
    "user@example.org/Tiny",
    "Qwen@evil/Tiny",
    "Qwen/Tiny@evil",
    "Qwen/Tiny?x=1",
    "Qwen/Tiny#x",
    "Qwen/Tiny%2f..%2f..",
    "%2e%2e/Tiny",
    "Qwen/Tiny;x",
    "Qwen/Tiny|x",
    "$(none)/Tiny",
    "`none`/Tiny",
    "-x/Tiny",
    "--help",
    "Qwen/-x",
    "Qwen/Tiny:../x.gguf",
    "Qwen/Tiny:/etc/x.gguf",
    "Qwen/Tiny:a/../x.gguf",
    "Qwen/Tiny:a/../../x.gguf",
    "Qwen/Tiny:..\\x.gguf",
    "Qwen/Tiny:file:///x.gguf",
    "Qwen/Tiny:x.py",
    "Qwen/Tiny:",
    "Qwen/Tiny:x.gguf?y",
    "a/b/c",
    "Ｑwen/Tiny",
    "Qwen/" + "a" * 5000,
]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_opens_and_connects_to_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        watched() as seen,
        pytest.raises(ModelNotFoundError),
    ):
        resolve(name, cache_dir=tmp_path, endpoint="http://127.0.0.1:9")
    assert seen == []


@pytest.mark.parametrize(
    "revision", ["../x", "a/../b", "", "a b", "/x", "a\0", "x?y", "..", "a..b"]
)
def test_what_is_no_revision_opens_and_connects_to_nothing(revision: str, tmp_path: Path) -> None:
    with watched() as seen, pytest.raises(ModelNotFoundError):
        resolve(
            "Qwen/Tiny",
            revision=revision,
            cache_dir=tmp_path,
            endpoint="http://127.0.0.1:9",
        )
    assert seen == []


@pytest.mark.parametrize("revision", ["a b", "../..", "", 5])
@pytest.mark.parametrize("name", ["", "default"])
def test_the_form_of_a_revision_counts_for_every_name(
    name: str, revision: Any, tmp_path: Path
) -> None:
    for find in (resolve, pull):
        with pytest.raises(ModelNotFoundError, match=r"revision .*: expected a branch, a tag or"):
            find(name or str(tmp_path), revision=revision, cache_dir=tmp_path)
    assert resolve(str(tmp_path), revision="main") == tmp_path


def test_the_watch_sees_what_is_opened(tmp_path: Path) -> None:
    with watched() as seen:
        (tmp_path / "file").write_text("")
    assert len(seen) == 1
    assert seen[0].startswith("open ")


_watches: list[list[str]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watches and event in ("open", "socket.connect", "socket.getaddrinfo"):
        _watches[-1].append(f"{event} {arguments[0]!r}")


@cache
def _install_audit() -> None:
    sys.addaudithook(_audit)  # for good: Python has no way to take one off


@contextmanager
def watched() -> Iterator[list[str]]:
    """The files opened and connections begun in the block, as Python's own audit sees them."""
    _install_audit()
    seen: list[str] = []
    _watches.append(seen)
    try:
        yield seen
    finally:
        _watches.remove(seen)
