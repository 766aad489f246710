"""The files of a batch: requests and answers, one a line, in OpenAI's format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qwenkit.errors import UsageError
from qwenkit.server.errors import ApiError
from qwenkit.server.json_body import parse_json

_WRONG_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Asked:
    """One line of the input."""

    custom_id: str
    line: dict[str, Any]


def check_input(path: Path) -> set[str]:
    """The ids of all requests in a file. Raises UsageError naming the lines that are none, before
    anything is computed.
    """
    ids: set[str] = set()
    wrong: list[str] = []
    for number, text in _lines(path):
        try:
            asked = _read(text)
            if asked.custom_id in ids:
                raise ValueError(f"the custom_id {asked.custom_id!r:.80} is there twice")
            ids.add(asked.custom_id)
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = f" And {len(wrong) - _WRONG_SHOWN} more." if len(wrong) > _WRONG_SHOWN else ""
        raise UsageError(f"{path}: {'; '.join(wrong[:_WRONG_SHOWN])}.{more}")
    if not ids:
        raise UsageError(f"{path} has no requests in it.")
    return ids


def open_output(path: Path, asked: set[str]) -> tuple[IO[bytes], set[str]]:
    """The output, ready to be added to, and the ids that it answers already.

    A last line that was torn when a run was killed is cut off. Raises UsageError for a file that
    answers other requests than those `asked`, or is no output at all.
    """
    try:
        file = path.open("a+b")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error
    try:
        _lock(file, path)
        return file, _answered(file, path, asked)
    except BaseException:
        file.close()
        raise


def requests_of(path: Path) -> Iterator[Asked]:
    """The requests of a file that `check_input` has let pass."""
    for _, text in _lines(path):
        yield _read(text)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers."""
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield number, text
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error


def _read(text: bytes) -> Asked:
    """A line of the input. Raises ValueError saying what is wrong with it."""
    try:
        line = parse_json(text)
    except ApiError as error:
        raise ValueError(error.message.replace("the body", "it").rstrip(".")) from error
    if not isinstance(line, dict) or not isinstance(line.get("custom_id"), str):
        raise ValueError("expected an object with a custom_id")
    return Asked(line["custom_id"], line)


def _lock(file: IO[bytes], path: Path) -> None:
    """Two runs must not write one file. Raises UsageError."""
    try:
        import fcntl
    except ImportError:  # where there is none, files that are open are not shared anyhow
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError(f"{path} is being written by another run.") from error


def _answered(file: IO[bytes], path: Path, asked: set[str]) -> set[str]:
    file.seek(0)
    done: set[str] = set()
    end = 0
    for text in file:
        if not text.endswith(b"\n"):
            break  # it was being written when the run was killed
        try:
            custom_id = json.loads(text)["custom_id"]
        except (ValueError, KeyError, TypeError) as error:
            message = f"{path} is there already, and is no output of a batch (byte {end + 1})."
            raise UsageError(message) from error
        if custom_id not in asked:
            raise UsageError(
                f"{path} is there already and answers other requests ({custom_id!r:.80}). Name "
                "another file."
            )
        done.add(custom_id)
        end += len(text)
    file.truncate(end)
    file.seek(end)
    return done
