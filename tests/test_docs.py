"""The documents say what is there: links, commands, options, files, functions, snippets."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import typer

from qwenkit.cli.docs import cli_markdown
from qwenkit.cli.main import COMMANDS, load_command

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "qwenkit"
READMES = ("README.md", "README_CN.md")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fences(page: Path, *kinds: str) -> Iterator[str]:
    """The fenced blocks of these kinds ("" is an unnamed one)."""
    for match in FENCE.finditer(text_of(page)):
        if match[1] in kinds:
            yield match[2]


def prose(page: Path) -> str:
    return FENCE.sub("", text_of(page))


@pytest.mark.parametrize("name", READMES)
def test_both_readmes_are_there(name: str) -> None:
    assert (ROOT / name).is_file()


def test_the_readmes_show_the_same_commands() -> None:
    english, chinese = (list(fences(ROOT / name, "sh")) for name in READMES)
    assert [code_of(block) for block in english] == [code_of(block) for block in chinese]


def code_of(block: str) -> list[list[str]]:
    """The words of each line; what is said in comments may differ."""
    lines = [re.sub(r"(?:^|\s)#.*", "", line).split() for line in block.splitlines()]
    return [line for line in lines if line]


def anchors(page: Path) -> set[str]:
    """The names that a page's headings can be linked by."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@page
def test_internal_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.MULTILINE))


def shell_commands(page: Path) -> Iterator[list[str]]:
    """Every command of ours that a page shows, in a block or as code within a line, as words."""
    lines = [line for block in fences(page, "sh", "bash", "console") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(page))
    for line in lines:
        try:
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        except ValueError:  # code within a line that is no command, such as a lone quote
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words and Path(words[0]).name in ("make", "qwenkit"):
            yield [Path(words[0]).name, *words[1:]]


@page
def test_commands_shown_exist(page: Path) -> None:
    wrong = [" ".join(c) for c in shell_commands(page) if (reason := unknown(c)) and reason]
    assert wrong == []


def unknown(command: list[str]) -> str:
    """What of a command does not exist; empty when all of it does."""
    program, *words = command
    if program == "make":
        asked = [w for w in words if not re.match(r"[A-Z]+=|-", w)]
        return ", ".join(w for w in asked if w not in make_targets())
    words = [w for w in words if w not in ("…", "...", "COMMAND")]
    if not words or words[0].startswith("-"):
        return ""
    if words[0] not in COMMANDS:
        return words[0]
    found: Any = load_command(words[0])
    rest = words[1:]
    while rest and rest[0] in getattr(found, "commands", {}):
        found, rest = found.commands[rest[0]], rest[1:]
    options = {name for parameter in found.params for name in parameter.opts} | {"-h", "--help"}
    given = [w.partition("=")[0] for w in rest if re.match(r"--?[a-z]", w)]
    return ", ".join(option for option in given if option not in options)


def test_an_unknown_command_target_and_option_would_be_found() -> None:
    assert unknown(["make", "chat", "PROMPT=x"]) == ""
    assert unknown(["make", "coffee"]) == "coffee"
    assert unknown(["qwenkit", "sing"]) == "sing"
    assert unknown(["qwenkit", "info", "x", "--json"]) == ""
    assert unknown(["qwenkit", "info", "--louder"]) == "--louder"
    assert unknown(["qwenkit", "bench", "speed", "--shape=x", "--slower"]) == "--slower"


def test_cli_md_is_the_help_of_the_commands() -> None:
    shown = text_of(ROOT / "docs" / "cli.md")
    assert shown == cli_markdown(), "docs/cli.md is old: run `make docs`"


def test_the_listed_summary_is_every_command() -> None:
    modules = {
        path.stem
        for path in (PACKAGE / "cli").glob("*.py")
        if re.search(r"^def command\(|^app = typer\.Typer\(", text_of(path), re.M)
        and path.stem != "main"
    }
    assert modules == set(COMMANDS)
    assert isinstance(
        typer.main.get_command(importlib.import_module("qwenkit.cli.main").app), object
    )


# Files and functions named in the pages: `engine/engine.py: Engine.step`, `cli/chat.py`.
FILE = re.compile(r"`([\w./{},-]+\.(?:py|cpp|h))(?:: ([\w.]+)[^`]*)?`")


def expand(path: str) -> list[str]:
    """a/{b,c}.py is a/b.py and a/c.py."""
    pieces = [p.split(",") for p in re.split(r"[{}]", path)]
    return ["".join(choice) for choice in product(*pieces)]


def find(path: str, near: Path | None) -> Path | None:
    """The file that a page means: from the root, from src, below the package, or near the last."""
    folders = [ROOT, ROOT / "src", PACKAGE, *([near.parent] if near else [])]
    return next((f / path for f in folders if (f / path).is_file()), None)


@cache
def defined(file: Path) -> frozenset[str]:
    """Names and dotted names that a Python file defines."""
    names: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            names.update(prefix + t.id for t in targets if isinstance(t, ast.Name))

    collect(ast.parse(text_of(file)).body, "")
    return frozenset(names)


@page
def test_files_and_functions_named_exist(page: Path) -> None:
    wrong, near = [], None
    for match in FILE.finditer(prose(page)):
        if "<" in match[1] or match[1] in EXAMPLES:
            continue
        for path in expand(match[1]):
            file = find(path, near)
            if file is None:
                wrong.append(path)
            elif match[2] and match[2] not in defined(file):
                wrong.append(f"{path}: {match[2]}")
            near = file or near
    assert wrong == []


EXAMPLES: frozenset[str] = frozenset()  # file names that a page only imagines


@page
def test_python_shown_is_python_and_imports_what_exists(page: Path) -> None:
    for block in fences(page, "python", "py"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qwenkit"):
                module = importlib.import_module(str(node.module))
                missing = [a.name for a in node.names if not hasattr(module, a.name)]
                assert missing == []
