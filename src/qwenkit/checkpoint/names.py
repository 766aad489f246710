"""Model names as users write them: which are hub names, which cannot be, and what was meant.

Pure text: nothing here looks at files or opens a connection.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from qwenkit.errors import ModelNotFoundError, UsageError

EMBEDDED_NAME = "default"

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_]|[.-](?![.-])){0,95}"
_HUB_NAME = re.compile(rf"({_PART})/({_PART})")
_FILE_STEP = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
_GGUF_FILE = re.compile(rf"(?:{_FILE_STEP}/){{0,4}}{_FILE_STEP}\.gguf")
_REVISION = re.compile(rf"(?:{_FILE_STEP}/){{0,4}}{_FILE_STEP}")


def _series(name: str, sizes: str, *endings: str) -> list[str]:
    return [
        f"Qwen/{name}-{size}{ending}" for size, ending in product(sizes.split(), ("", *endings))
    ]


WELL_KNOWN = (
    *_series("Qwen", "1_8B 7B 14B 72B", "-Chat", "-Chat-Int4", "-Chat-Int8"),
    *_series("Qwen1.5", "0.5B 1.8B 4B 7B 14B 32B 72B 110B MoE-A2.7B", "-Chat"),
    *_series("Qwen2", "0.5B 1.5B 7B 57B-A14B 72B", "-Instruct", "-Instruct-GGUF"),
    *_series("Qwen2.5", "0.5B 1.5B 3B 7B 14B 32B 72B", "-Instruct", "-Instruct-GGUF"),
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-360M-Instruct",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct",
)


@dataclass(frozen=True, slots=True)
class HubName:
    """`organisation/name`, or `organisation/name:path/in/it.gguf` for one file of a repository."""

    organisation: str
    name: str
    file: str | None = None

    @property
    def repository(self) -> str:
        return f"{self.organisation}/{self.name}"

    def __str__(self) -> str:
        return self.repository if self.file is None else f"{self.repository}:{self.file}"


def given_path(setting: str, given: object) -> Path:
    """A path given as text or as a Path. Raises UsageError naming the setting."""
    if not isinstance(given, str | Path) or not str(given) or "\0" in str(given):
        raise UsageError(f"{setting}: expected a path, got {given!r}.")
    return Path(given)


def existing_path(name: str) -> Path | None:
    """What a name means on this machine, if it does. Raises ModelNotFoundError for no name."""
    if not name or "\0" in name:
        raise ModelNotFoundError(f"model name {name!r}: empty or not a text. {did_you_mean('')}")
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # too long for a path; a '~name' that is nobody's home
        return None


def parse_hub_name(name: str) -> HubName:
    """Read a hub name. Raises ModelNotFoundError for anything else, saying what was meant."""
    repository, colon, file = name.partition(":")
    match = _HUB_NAME.fullmatch(repository)
    if match is None:
        raise ModelNotFoundError(
            f"{name!r} is no existing file or folder, and no hub name of the form "
            f"'organisation/name'. {did_you_mean(name)}"
        )
    if colon and not _GGUF_FILE.fullmatch(file):
        raise ModelNotFoundError(
            f"{name!r}: after the colon goes the path of one .gguf file of the repository, "
            f"such as 'Qwen/Qwen2-0.5B-Instruct-GGUF:qwen2-0_5b-instruct-q4_0.gguf'."
        )
    return HubName(match[1], match[2], file or None)


def check_revision(revision: str) -> str:
    """A branch, tag or commit as it was given. Raises ModelNotFoundError if it cannot be one."""
    if not isinstance(revision, str) or not _REVISION.fullmatch(revision) or ".." in revision:
        raise ModelNotFoundError(
            f"revision {revision!r}: expected a branch, a tag or a commit, such as 'main'."
        )
    return revision


def did_you_mean(name: str) -> str:
    """What to do about a name that leads nowhere: the well-known names nearest to it, if any."""
    by_tail = {known.partition("/")[2].lower(): known for known in WELL_KNOWN}
    by_tail[EMBEDDED_NAME] = EMBEDDED_NAME
    tail = re.split(r"[/\\]", name)[-1].lower()
    near = [tail] if tail in by_tail else difflib.get_close_matches(tail, by_tail, n=3, cutoff=0.75)
    meant = " or ".join(repr(by_tail[match]) for match in near if by_tail[match] != name)
    question = f"Did you mean {meant}? " if meant else ""
    return (
        f"{question}Give a folder, a .gguf file, a hub name, or {EMBEDDED_NAME!r} for the "
        "embedded model."
    )
