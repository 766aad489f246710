"""What `qwenkit serve` and `qwenkit batch` have in common."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Annotated

import typer

from qwenkit.cli import loading, options
from qwenkit.errors import MissingDependencyError, UsageError

_DEFAULT = "[default: as many as one answer of the full context takes]"

Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=PATH",
        help="A LoRA adapter that requests name as their model; may be given several times.",
    ),
]
ServedNames = Annotated[
    list[str] | None,
    typer.Option(
        "--served-model-name",
        metavar="NAME",
        help="What requests call the model; several times for several names, of which answers bear "
        "the first. [default: the model's own]",
    ),
]
KvCacheTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help=f"Room for prompts and answers of all requests. {_DEFAULT}"
    ),
]


def check_installed(command: str) -> None:
    """Raises MissingDependencyError where what a server needs is not there."""
    for package in ("fastapi", "httptools", "prometheus_client", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "serve", command)


def read_adapters(given: Iterable[str] | None) -> dict[str, str]:
    """Names and paths of adapters. Raises UsageError for a name that is there twice."""
    adapters: dict[str, str] = {}
    for one in given or ():
        read = loading.read_adapter_option(one)
        if set(read) & set(adapters):
            raise UsageError(f"--adapter: the name {next(iter(read))!r} is there twice.")
        adapters |= read
    return adapters


def check_names(adapters: Iterable[str], names: Iterable[str]) -> None:
    """Raises UsageError for an adapter that nobody could ask for: it is called as the model is."""
    for name in adapters:
        if name in (*names, options.DEFAULT_MODEL):
            raise UsageError(
                f"--adapter: {name!r} is a name of the model itself; name the adapter otherwise: "
                "--adapter NAME=PATH."
            )


def public_name(given: str, own_name: str) -> str:
    """What a model is called where nothing else is said: its name on a hub as it was given, else
    what its files say; never a path of this machine.
    """
    if given == options.DEFAULT_MODEL or options.is_local(given):
        return own_name
    return given
