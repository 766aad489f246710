"""The options of `qwenkit bench speed`, and what its sisters share."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from qwenkit.bench.environments import RECIPES
from qwenkit.bench.peers.spec import WEIGHTS, WeightName, WeightSetting
from qwenkit.bench.shapes import SHAPES
from qwenkit.errors import UsageError, suggest

DEFAULT_PEERS = ("llama.cpp", "transformers")
GROUP_SIZES = (32, 64, 128)

Model = Annotated[
    str, typer.Argument(help="A model: name, folder or .gguf file.", show_default=True)
]
ShapeName = Annotated[
    str | None,
    typer.Option(
        "--shape",
        help=f"Random weights of a published shape instead: {', '.join(SHAPES)}.",
        show_default=False,
    ),
]
Storage = Annotated[
    str, typer.Option(help="How --shape stores a GGUF file's matrices: Q4_0, Q8_0, BF16 …")
]
WeightKind = Annotated[
    str | None,
    typer.Option(
        help="What every engine holds weights as, each in its nearest way, instead of "
        f"--storage: {', '.join(WEIGHTS)}.",
        show_default=False,
    ),
]
GroupSize = Annotated[
    int, typer.Option(help="Numbers that share a scale in int4 and int8: 32, 64 or 128.")
]
Head = Annotated[
    str | None,
    typer.Option(
        help="What the output matrix is held as, where an engine lets it be said.",
        show_default="each engine's own",
    ),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        help=f"An engine to compare with, repeatable: {', '.join(RECIPES)}, or none "
        f"[default: {' and '.join(DEFAULT_PEERS)}].",
        show_default=False,
    ),
]
MakePeers = Annotated[
    bool,
    typer.Option("--make-peers", help="Make the environments that peers need: 0.5 to 3.5 GB."),
]
PeerPython = Annotated[
    Path | None,
    typer.Option(help="A Python that has the peers installed.", show_default="each its own"),
]
Streams = Annotated[
    list[int] | None,
    typer.Option(
        help="Decode so many sequences at once, repeatable; 1 for none. [default: 8]",
        min=1,
        show_default=False,
    ),
]
Contexts = Annotated[
    list[int] | None,
    typer.Option(
        help="Decode after so many tokens too (2048, 8192), repeatable.",
        min=1,
        show_default=False,
    ),
]


def make_folder(option: str, folder: Path) -> None:
    """Make a folder for results. Raises UsageError naming the `option` when it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option}: {str(folder)!r}: {error.strerror}.") from error


def this_command() -> str:
    """The command line of this process, to be recorded beside what it measures."""
    return shlex.join(["qwenkit", *sys.argv[1:]])


def cache_folder() -> Path:
    """Where random weights and peers' environments are kept: the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "qwenkit"


def weight_setting(weights: str | None, group_size: int, head: str | None) -> WeightSetting | None:
    """What the options say of how weights are held; None where they say nothing.

    Raises UsageError naming the option.
    """
    by_name: dict[str, WeightName] = {name: name for name in WEIGHTS}
    for option, given in (("weights", weights), ("head", head)):
        if given is not None and given not in by_name:
            raise UsageError(f"{option}: got {given!r}. {suggest(given, WEIGHTS)}")
    if weights is None:
        if head is not None:
            raise UsageError("head: says something only together with --weights.")
        return None
    if group_size not in GROUP_SIZES:
        raise UsageError(f"group_size: got {group_size}; allowed: 32, 64, 128.")
    return WeightSetting(
        name=by_name[weights],
        group_size=group_size,
        head=None if head is None else by_name[head],
    )


def chosen_peers(given: list[str] | None) -> tuple[str, ...]:
    """The peers to compare with. Raises UsageError for an unknown one."""
    known = [*RECIPES, "none"]
    if given is None:
        return DEFAULT_PEERS
    if "none" in given and len(given) > 1:
        raise UsageError("peer: 'none' stands alone.")
    for name in given:
        if name not in known:
            raise UsageError(f"peer: got {name!r}. {suggest(name, known)}")
    return tuple(name for name in dict.fromkeys(given) if name != "none")
