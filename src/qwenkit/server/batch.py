"""Files of requests in OpenAI's batch format, answered without a server.

A line of the input is {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body":
{…}}, a line of the output {"id": …, "custom_id": …, "response": {"status_code": …, "request_id": …,
"body": {…}}, "error": null}. What is in the output already is not asked again, so that a run that
was ended goes on where it was.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qwenkit.api import AsyncLLM
from qwenkit.api.bar import Advance
from qwenkit.errors import QwenkitError, UsageError
from qwenkit.server.app import guarded
from qwenkit.server.errors import ApiError
from qwenkit.server.guard import Guard
from qwenkit.server.json_body import parse_json
from qwenkit.server.local import post
from qwenkit.server.served import DEAD, Served
from qwenkit.server.settings import ServerSettings
from qwenkit.server.sse import compact

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
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


async def run_batch(
    llm: AsyncLLM,
    settings: ServerSettings,
    source: Path,
    output: IO[bytes],
    done: set[str],
    *,
    at_once: int,
    advance: Advance,
) -> int:
    """Answer what is not `done`, so many requests `at_once`; how many of them failed.

    Every answer is a line of `output` as soon as it is there, whichever comes first. `advance` is
    told of each with the tokens that it took. Raises QwenkitError when the engine has ended.
    """
    served = Served(llm, settings)
    app = guarded(served)
    waiting = (asked for asked in _requests(source) if asked.custom_id not in done)
    failed = 0

    async def work() -> None:
        nonlocal failed
        for asked in waiting:
            line, tokens, is_well = await _answer(app, asked)
            if not served.is_alive:
                raise QwenkitError(DEAD)
            failed += not is_well
            output.write(line)
            output.flush()
            advance(tokens)

    async with served.looked_after():
        workers = [asyncio.create_task(work()) for _ in range(at_once)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
    return failed


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers."""
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield number, text
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error


def _requests(path: Path) -> Iterator[Asked]:
    for _, text in _lines(path):
        yield _read(text)


def _read(text: bytes) -> Asked:
    """A line of the input. Raises ValueError saying what is wrong with it."""
    try:
        line = parse_json(text)
    except ApiError as error:
        raise ValueError(error.message.replace("the body", "it").rstrip(".")) from error
    if not isinstance(line, dict) or not isinstance(line.get("custom_id"), str):
        raise ValueError("expected an object with a custom_id")
    return Asked(line["custom_id"], line)


async def _answer(app: Guard, asked: Asked) -> tuple[bytes, int, bool]:
    """The line of the output, the tokens of its answer, and whether all went well."""
    wrong = _wrong(asked.line)
    response: dict[str, Any]
    if wrong is not None:
        response = {"status_code": wrong.status, "request_id": None, "body": wrong.content()}
    else:
        body = compact(asked.line["body"]).encode("utf-8", "replace")
        answer = await post(app, asked.line["url"], body)
        response = {
            "status_code": answer.status,
            "request_id": answer.headers.get("x-request-id"),
            "body": json.loads(answer.body),
        }
    line = {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": asked.custom_id,
        "response": response,
        "error": None,
    }
    usage = response["body"].get("usage") or {}
    tokens = usage.get("completion_tokens", usage.get("output_tokens", 0))
    is_well = response["status_code"] == 200
    return compact(line).encode("utf-8", "replace") + b"\n", tokens, is_well


def _wrong(line: dict[str, Any]) -> ApiError | None:
    """What is wrong with a request before its body is looked at."""
    for name in line:
        if name not in ("custom_id", "method", "url", "body"):
            return ApiError(400, f"{name}: unknown field.", name, "unknown_parameter")
    if line.get("method", "POST") != "POST":
        return ApiError(400, f"method: got {line['method']!r}; POST it is.", "method")
    if line.get("url") not in URLS:
        message = f"url: got {line.get('url')!r}; allowed: {', '.join(URLS)}."
        return ApiError(404, message, "url", "unknown_url")
    if not isinstance(line.get("body"), dict):
        return ApiError(400, "body: expected an object.", "body", "invalid_value")
    if line["body"].get("stream"):
        return ApiError(400, "stream: a batch has no streams; leave it out.", "stream")
    return None


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
