"""Row 22: prompts at the limit and beyond it, at every endpoint: none is cut without a word."""

from __future__ import annotations

import re
from typing import Any

from qwenkit.bench.http_client import Answer, Target, ask
from qwenkit.bench.reliability.board import Board
from qwenkit.bench.reliability.model import CONTEXT_TOKENS
from qwenkit.bench.reliability.spec import Row, Tally
from qwenkit.bench.reliability.wire import CHAT, COMPLETIONS, fault_of_answer
from qwenkit.errors import QwenkitError

_EMBEDDINGS, _RESPONSES = "/v1/embeddings", "/v1/responses"
_WORD = " a"  # one token each, whatever stands beside it
_TIMES = (1, 2, 1000)
_TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "x", "parameters": {"type": "object"}},
}


async def run(board: Board, tally: Tally) -> None:
    """The raw prompts by ids, the conversations by words that are counted first."""
    server = await board.server()
    target, model = server.target, board.served_name
    await _raw(target, model, tally)
    for kind in ("chat", "chat with tools", "chat with a file", "responses"):
        board.say(f"row 22, {kind}")
        await _conversation(target, model, kind, tally)
    await _embeddings(target, model, tally)


async def _raw(target: Target, model: str, tally: Tally) -> None:
    for more, fits in ((-1, True), (0, False), (1, False)):
        await _ids(target, model, CONTEXT_TOKENS + more, 1, tally, fits=fits)
    for times in _TIMES[1:]:
        await _ids(target, model, times * CONTEXT_TOKENS, None, tally, fits=False)
    await _ids(target, model, CONTEXT_TOKENS - 8, 100, tally, fits=None)


async def _ids(
    target: Target, model: str, count: int, tokens: int | None, tally: Tally, *, fits: bool | None
) -> None:
    content: dict[str, Any] = {"model": model, "prompt": [64] * count}
    if tokens is not None:
        content["max_tokens"] = tokens
    answer = await ask(target, COMPLETIONS, content)
    _judge(f"completion of {count} tokens, max_tokens {tokens}", answer, count, fits, tally)


def _request(kind: str, model: str, words: int) -> tuple[str, dict[str, Any]]:
    text = _WORD * words
    if kind == "responses":
        return _RESPONSES, {"model": model, "input": text}
    messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
    if kind == "chat with a file":
        part = {"type": "text", "text": f"<file name='a.txt'>\n{text}\n</file>"}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "Sum it up."}]}]
    content: dict[str, Any] = {"model": model, "messages": messages}
    return CHAT, content | ({"tools": [_TOOL]} if kind == "chat with tools" else {})


async def _conversation(target: Target, model: str, kind: str, tally: Tally) -> None:
    field = "max_output_tokens" if kind == "responses" else "max_tokens"
    path, content = _request(kind, model, 10)
    around = await _prompt_tokens(target, path, content | {field: 1}) - 10
    for more, fits in ((-1, True), (0, False), (1, False)):
        words = CONTEXT_TOKENS + more - around
        path, content = _request(kind, model, words)
        answer = await ask(target, path, content | {field: 1})
        name = f"{kind} of {CONTEXT_TOKENS + more} tokens"
        _judge(name, answer, CONTEXT_TOKENS + more, fits, tally)
    for times in _TIMES[1:]:
        words = times * CONTEXT_TOKENS - around
        answer = await ask(target, *_request(kind, model, words))
        _judge(f"{kind} of {times} times the limit", answer, times * CONTEXT_TOKENS, False, tally)


async def _prompt_tokens(target: Target, path: str, content: dict[str, Any]) -> int:
    answer = await ask(target, path, content)
    usage = (answer.json() or {}).get("usage") or {}
    count = usage.get("prompt_tokens", usage.get("input_tokens"))
    if count is None:
        raise QwenkitError(f"{path}: {answer.shown}")
    return int(count)


async def _embeddings(target: Target, model: str, tally: Tally) -> None:
    for count, fits in ((CONTEXT_TOKENS, True), (CONTEXT_TOKENS + 1, False)):
        answer = await ask(target, _EMBEDDINGS, {"model": model, "input": [64] * count})
        _judge(f"embedding of {count} tokens", answer, count, fits, tally)


def _judge(name: str, answer: Answer, tokens: int, fits: bool | None, tally: Tally) -> None:
    """`fits` None: it may be refused, or answered with an end for want of room."""
    tally.took(answer.seconds)
    if answer.status == 200 and fits is not False:
        value = answer.json() or {}
        usage = value.get("usage") or {}
        counted = usage.get("prompt_tokens", usage.get("input_tokens"))
        reasons = {choice.get("finish_reason") for choice in value.get("choices") or ()}
        told = fits or reasons == {"length"}
        detail = f"{counted} of {tokens} tokens were read, {reasons}"
        tally.check(name, counted == tokens and told, detail)
        return
    numbers = {int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*", answer.shown)}
    named = {tokens, CONTEXT_TOKENS} <= numbers or answer.status == 413
    refused = not fault_of_answer(answer) and 400 <= answer.status < 500
    tally.check(name, fits is not True and refused and named, answer.shown)


ROW = Row(
    id=22,
    promise="a prompt that is too long is refused with both counts, and none is cut in silence",
    run=run,
)
