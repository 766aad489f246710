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
from collections.abc import Container
from pathlib import Path
from typing import IO, Any

from qwenkit.api import AsyncLLM
from qwenkit.api.bar import Advance
from qwenkit.errors import QwenkitError
from qwenkit.server.app import guarded
from qwenkit.server.batch_files import Asked, requests_of
from qwenkit.server.errors import ApiError
from qwenkit.server.guard import Guard
from qwenkit.server.local import post
from qwenkit.server.served import FAULTS, Served
from qwenkit.server.settings import ServerSettings
from qwenkit.server.sse import compact


async def run_batch(
    llm: AsyncLLM,
    settings: ServerSettings,
    source: Path,
    output: IO[bytes],
    done: Container[str],
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
    waiting = (asked for asked in requests_of(source) if asked.custom_id not in done)
    failed = 0

    async def work() -> None:
        nonlocal failed
        for asked in waiting:
            line, tokens, is_well = await _answer(app, asked)
            state = served.state
            if state != "ok":
                raise QwenkitError(FAULTS[state])
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
    """What is wrong with a request before its body is looked at, beyond what `check_input` refuses
    for the whole file.
    """
    for name in line:
        if name not in ("custom_id", "method", "url", "body"):
            return ApiError(400, f"{name}: unknown field.", name, "unknown_parameter")
    if not isinstance(line.get("body"), dict):
        return ApiError(400, "body: expected an object.", "body", "invalid_value")
    if line["body"].get("stream"):
        return ApiError(400, "stream: a batch has no streams; leave it out.", "stream")
    return None
