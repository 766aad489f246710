"""The house stands: rooms on disk are the rooms on the arrow, each keeps to what it may do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "qwenkit"
CONTRACTS: list[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][
    "importlinter"
]["contracts"]
ARROW: list[str] = next(c for c in CONTRACTS if c["type"] == "layers")["layers"]
SOURCES = sorted(PACKAGE.rglob("*.py"))


def rooms_on_disk() -> set[str]:
    """Modules and packages right below the package; a folder without Python files is no room."""
    modules = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    return modules | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}


def rooms_on_the_arrow() -> tuple[set[str], set[str]]:
    """(rooms that must be there, rooms that later work may add: they stand in brackets)."""
    names = [part.strip() for layer in ARROW for part in re.split("[|:]", layer)]
    later = {n.strip("()") for n in names if n.startswith("(")}
    return {n.strip("()") for n in names} - later, later


def test_the_rooms_are_those_on_the_arrow() -> None:
    needed, later = rooms_on_the_arrow()
    assert needed - rooms_on_disk() == set()
    assert rooms_on_disk() - needed - later == set()


def test_a_room_says_what_it_is() -> None:
    silent = []
    for source in SOURCES:
        tree = ast.parse(source.read_text(encoding="utf-8"))
        if tree.body and not ast.get_docstring(tree):
            silent.append(source.relative_to(ROOT).as_posix())
    assert silent == []


def test_the_import_contracts_hold() -> None:
    pytest.importorskip("importlinter", reason="import-linter comes with the check extra")
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as f; f()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def listed(document: str) -> set[str]:
    """The names right below src/qwenkit/ in the first tree that a document draws."""
    text = (ROOT / document).read_text(encoding="utf-8")
    tree = re.search(r"^```\nsrc/qwenkit/\n(.*?)^(?:\S|```)", text, re.DOTALL | re.MULTILINE)
    assert tree is not None, f"{document} draws no tree that begins with src/qwenkit/"
    entries = [line[2:] for line in tree[1].splitlines() if re.match(r"  \S", line)]
    names = [re.split(r" {2,}", entry)[0] for entry in entries]
    return {re.sub(r"/$|\.py$", "", name) for line in names for name in line.split(", ")}


@pytest.mark.parametrize("document", ["docs/architecture.md", "README.md"])
def test_the_tree_drawn_is_the_tree_on_disk(document: str) -> None:
    assert listed(document) - {"__init__"} == rooms_on_disk() - {"__main__"}


# Effects are rationed: what reaches outside the process stands in few, named places.
EFFECTS = {
    "the network": (
        {"socket", "http", "urllib.request", "urllib3", "requests", "httpx", "aiohttp", "ssl"},
        {
            "checkpoint/hub.py",
            "server/door.py",  # the port that it listens on
            "server/run.py",
            "bench/http_client.py",  # the client of servers that are measured
            "bench/server_process.py",  # free ports for them
        },
    ),
    "processes": (
        {"subprocess", "multiprocessing", "pty"},
        {
            "checkpoint/embedded.py",  # pip
            "kernels/build.py",  # the C++ compiler
            "bench/ceilings.py",  # the C++ compiler, for this very processor
            "bench/environments.py",  # pip
            "bench/process.py",  # an engine is measured in a process of its own
            "bench/server_process.py",  # and so is a server
            "bench/memory.py",  # and the memory of a model
            "bench/peers/onnxruntime.py",  # its model builder is a program
        },
    ),
    "threads": (
        {"threading", "_thread", "concurrent.futures", "concurrent"},
        {
            "engine/worker.py",
            "engine/constrain.py",  # compiles in a thread, within a time
            "kernels/build.py",  # one build at a time
            "kernels/cpu/bind.py",
            "quantize/gguf_export.py",  # slabs of a matrix are quantized side by side
            "compat/streamers.py",  # the published iterator is filled from a thread of the user's
        },
    ),
}


def imported(source: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("effect", EFFECTS)
def test_effects_stay_where_they_belong(effect: str) -> None:
    modules, allowed = EFFECTS[effect]
    users = {
        source.relative_to(PACKAGE).as_posix()
        for source in SOURCES
        if modules & set(imported(source)) and "cli" not in source.relative_to(PACKAGE).parts
    }
    assert users - allowed == set()


def test_the_environment_is_read_at_the_door_only() -> None:
    readers = {
        source.relative_to(PACKAGE).as_posix()
        for source in SOURCES
        if re.search(r"\bos\.(?:environ|getenv)\b|from os import .*environ", source.read_text())
    }
    outside = {r for r in readers if not r.startswith("cli/")}
    assert outside <= {"kernels/build.py"}


def test_only_the_command_line_prints() -> None:
    printers = {
        source.relative_to(PACKAGE).as_posix()
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    }
    assert {p for p in printers if not p.startswith("cli/")} == set()


@pytest.mark.parametrize(
    "words", [r"\bTODO\b", r"\bFIXME\b", r"\bXXX\b", r"raise NotImplementedError"]
)
def test_nothing_is_left_for_later(words: str) -> None:
    found = [
        f"{source.relative_to(ROOT)}: {line.strip()}"
        for source in SOURCES
        for line in source.read_text(encoding="utf-8").splitlines()
        if re.search(words, line)
    ]
    assert found == []


def test_no_file_names_a_folder_of_one_machine() -> None:
    folders = re.compile(r"/(?:home|Users|work|tmp)/\w|/root\b")
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\0")
    wrong = [
        name
        for name in filter(None, tracked)
        if (ROOT / name).suffix in (".py", ".toml", ".md", ".txt", ".cpp", ".h", "", ".json")
        and name != "tests/test_rooms.py"
        and (ROOT / name).is_file()
        and folders.search((ROOT / name).read_text(encoding="utf-8", errors="replace"))
    ]
    assert wrong == []


def test_every_test_file_has_a_name_of_its_own() -> None:
    """pytest imports them by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
