"""The files of a batch: requests and answers, one a line, in OpenAI's format."""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qwenkit.checkpoint.atomic import replacing
from qwenkit.errors import UsageError
from qwenkit.server.errors import ApiError
from qwenkit.server.json_body import parse_json

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
METHOD = "POST"
_WRONG_SHOWN = 5
_BEGINNING = b'{"id":"batch_req_'  # of every line that is written here


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


def check_apart(source: Path, output: Path) -> None:
    """Raises UsageError where answers would be written into the file of the requests."""
    try:
        is_same = source.samefile(output)
    except OSError:  # one of them is not there
        return
    if is_same:
        raise UsageError(
            f"IN.jsonl and OUT.jsonl are one file, {output}: the answers would be written among "
            "the requests. Name another file for OUT.jsonl."
        )


def open_output(path: Path, asked: Set[str]) -> tuple[IO[bytes], dict[str, bool]]:
    """The output, ready to be added to, and the ids that it answers already: True for those whose
    requests went well, False for those that failed.

    A last line that was torn when a run was killed is cut off, and what a run that was killed has
    replaced is taken out. Raises UsageError for a file that answers other requests than those
    `asked`, or is no output at all; CheckpointError when the disk refuses.
    """
    file = _open_locked(path)
    try:
        answered, replaced = _read_output(file, path, asked)
        if not replaced:
            return file, answered
        _write_without(replaced, file, path)
    except BaseException:
        file.close()
        raise
    file.close()
    return _open_locked(path), answered


def drop_replaced(file: IO[bytes], path: Path, asked: Set[str]) -> None:
    """Take the failures out of an output that hold no more, as a later line answers their request.

    `file` is what `open_output` gave for `path`; nothing may be written to it afterwards. Whoever
    reads `path`, and whoever kills this, finds all lines or those that hold, never fewer. Raises
    CheckpointError when the disk refuses.
    """
    file.flush()
    _, replaced = _read_output(file, path, asked)
    if replaced:
        _write_without(replaced, file, path)


def requests_of(path: Path) -> Iterator[Asked]:
    """The requests of a file that `check_input` has let pass."""
    for _, text in _lines(path):
        yield _read(text)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers."""
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if number == 1:  # some editors begin a file with the mark of UTF-8
                    text = text.removeprefix(codecs.BOM_UTF8)
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
    if not isinstance(line, dict):
        raise ValueError("expected an object with custom_id, method, url and body")
    if "custom_id" not in line:
        raise ValueError('custom_id is missing; give a string of your own, such as "1"')
    custom_id = line["custom_id"]
    if not isinstance(custom_id, str):
        raise ValueError(f'custom_id must be a string, such as "1"; got {custom_id!r:.80}')
    if (method := line.get("method", METHOD)) != METHOD:
        raise ValueError(f"method: got {method!r:.80}; allowed: {METHOD}")
    if "url" not in line:
        raise ValueError(f"url is missing; allowed: {', '.join(URLS)}")
    if (url := line["url"]) not in URLS:
        raise ValueError(f"url: got {url!r:.80}; allowed: {', '.join(URLS)}")
    return Asked(custom_id, line)


def _open_locked(path: Path) -> IO[bytes]:
    """A file to be read and added to, by this run alone. Raises UsageError."""
    try:
        file = path.open("a+b")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error
    try:
        _lock(file, path)
    except BaseException:
        file.close()
        raise
    return file


def _lock(file: IO[bytes], path: Path) -> None:
    """Two runs must not write one file. Raises UsageError."""
    try:
        import fcntl
    except ImportError:  # where there is none, files that are open are not shared anyhow
        return
    message = f"{path} is being written by another run."
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_current = os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError as error:
        raise UsageError(message) from error
    if not is_current:  # another run has put a new file there between our opening and locking
        raise UsageError(message)


def _read_output(file: IO[bytes], path: Path, asked: Set[str]) -> tuple[dict[str, bool], set[int]]:
    """The ids that are answered, and whether well, and the numbers of the lines, from 1, that do
    not hold: failures where another line answers the same request.

    The file is left at its end, without a torn last line. Raises UsageError.
    """
    file.seek(0)
    answered: dict[str, bool] = {}
    failures: dict[str, int] = {}
    replaced: set[int] = set()
    end = 0
    for number, text in enumerate(file, 1):
        if not text.endswith(b"\n") and _is_torn(text):
            break  # it was being written when the run was killed
        place = f"{path}, line {number}"
        custom_id, is_well = _read_answer(text, place)
        if custom_id not in asked:
            raise UsageError(
                f"{place}: the file is there already and answers other requests "
                f"({custom_id!r:.80}). Name another file for OUT.jsonl."
            )
        if custom_id in failures:
            replaced.add(failures.pop(custom_id))
        if not is_well and answered.get(custom_id):
            replaced.add(number)
        elif not is_well:
            failures[custom_id] = number
        answered[custom_id] = is_well or answered.get(custom_id, False)
        end += len(text)
    file.truncate(end)
    file.seek(end)
    return answered, replaced


def _is_torn(text: bytes) -> bool:
    """True for the beginning of a line that a run writes; another's file is not to be cut."""
    start = text.replace(b" ", b"")[: len(_BEGINNING)]
    return _BEGINNING.startswith(start)


def _read_answer(text: bytes, place: str) -> tuple[str, bool]:
    """The id of the request that a line of the output answers, and whether it went well. Raises
    UsageError naming the `place` of a line that is no answer.
    """
    fault = "is no answer with custom_id, response and error"
    try:
        line = json.loads(text)
        custom_id = line["custom_id"]
        is_answer = isinstance(custom_id, str) and ("response" in line or "error" in line)
        if is_answer and not text.endswith(b"\n"):
            is_answer, fault = False, "does not end with a line break"
    except (ValueError, KeyError, TypeError, RecursionError):
        is_answer = False
    if not is_answer:
        raise UsageError(
            f"{place}: the file is there already, and is no output of a batch: this line {fault}. "
            "Name another file for OUT.jsonl."
        )
    response = line.get("response")
    status = response.get("status_code") if isinstance(response, dict) else None
    return custom_id, status == 200 and line.get("error") is None


def _write_without(lines: Set[int], file: IO[bytes], path: Path) -> None:
    """Put a new file in the place of the output at `path`, open as `file`, without those lines.

    Raises CheckpointError when the disk refuses.
    """
    mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    file.seek(0)
    with replacing(path.resolve()) as new:  # a link stays, and leads to the new file
        os.chmod(new.name, mode)
        new.writelines(text for number, text in enumerate(file, 1) if number not in lines)
