"""/v1/completions: texts continued as they are."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import Response

from qwenkit.api.choices import Choices
from qwenkit.engine.request import Request as EngineRequest
from qwenkit.engine.service import AsyncEventStream
from qwenkit.errors import QwenkitError
from qwenkit.server.answers import (
    Answers,
    Tally,
    check_finish,
    check_logprobs,
    choices_of,
    request_options,
    stop_reason,
    writer_of,
)
from qwenkit.server.errors import ApiError, described
from qwenkit.server.facts import Facts, facts_of
from qwenkit.server.logprobs import CompletionLogprobs, LogprobWriter
from qwenkit.server.route import group
from qwenkit.server.served import Served, Target
from qwenkit.server.sse import DONE, Json, Streamed, assembled, compact, event, json_answer
from qwenkit.server.usage import usage_of
from qwenkit.server.wire.completions import (
    MAX_TOKENS,
    CompletionAnswer,
    CompletionRequest,
    prompts_of,
)
from qwenkit.server.wire.generation import check_stream_options, sampling_changes
from qwenkit.types.events import Event, FinishEvent, PromptEvent, TokenEvent, TokenLogprob

router = group()


@dataclass(slots=True)
class Completion:
    """One request, ready to run; `shown` is what is to stand before each answer's text."""

    served: Served
    facts: Facts
    body: CompletionRequest
    target: Target
    choices: Choices
    answers: Answers
    shown: list[str]
    usage_in_stream: bool
    id: str
    created: int

    def head(self) -> dict[str, Any]:
        """The fields that stand before the choices."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.target.name,
            "system_fingerprint": self.served.fingerprint,
        }

    def texts(self) -> list[Text]:
        """An empty answer for each of the engine's requests."""
        writer = None
        if self.body.logprobs is not None:
            writer = writer_of(self.served, self.choices.sampling)
        return [
            Text(request.prompt_ids, shown, writer, only_prompt=self.body.max_tokens == 0)
            for request, shown in zip(self.answers.requests, self.shown, strict=True)
        ]


class Text:
    """One answer as it comes: its text, and the log-probabilities of its tokens."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        shown: str,
        writer: LogprobWriter | None,
        *,
        only_prompt: bool,
    ) -> None:
        self._ids = prompt_ids
        self._shown = shown
        self._writer = writer
        self._logprobs = None if writer is None else CompletionLogprobs(writer)
        self._only_prompt = only_prompt
        self.finish: FinishEvent | None = None

    def push(self, events: Sequence[Event]) -> tuple[str, dict[str, list[Json]] | None]:
        """The text and log-probabilities of what has come. Raises ApiError for a failed answer."""
        pieces, self._shown = [self._shown], ""
        tokens: list[tuple[int, TokenLogprob | None]] = []
        for one in events:
            if isinstance(one, PromptEvent):
                at = slice(one.start, one.start + len(one.logprobs))
                tokens += zip(self._ids[at], one.logprobs, strict=True)
                continue
            if isinstance(one, FinishEvent):
                check_finish(one)
                self.finish = one
            if self._only_prompt:
                continue
            pieces.append(one.text)
            if (
                isinstance(one, TokenEvent)
                and one.logprob is not None
                and not (self._writer and self._writer.is_stop(one.token_id))
            ):
                known = TokenLogprob(one.token_id, one.logprob, one.top_logprobs or ())
                tokens.append((one.token_id, known))
        content = None if self._logprobs is None else self._logprobs.content(tokens)
        return "".join(pieces), content


@router.post(
    "/v1/completions", response_model=CompletionAnswer, summary="Texts continued as they are."
)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Answers as one JSON object, or with `stream` as server-sent events."""
    served: Served = request.app.state.served
    completion = await prepared(body, served, facts_of(request.scope))
    if body.stream:
        return Streamed(stream_pieces(completion), keep_alive_s=served.settings.keep_alive_s)
    try:
        async with completion.answers.running() as stream:
            return json_answer(await answer(completion, stream))
    except QwenkitError as error:
        raise described(error, "prompt") from error


async def prepared(body: CompletionRequest, served: Served, facts: Facts) -> Completion:
    """Everything up to the engine. Raises ApiError."""
    target = served.target(body.model)
    facts.model, facts.stream = target.name, bool(body.stream)
    usage_in_stream = check_stream_options(body)
    prompts = prompts_of(body.prompt)
    _check(body, prompts, served)
    if served.settings.log_prompts:
        facts.prompt = prompts
    try:
        options = request_options(served, body, facts, target, body.user)
        changes = sampling_changes(
            body, max(1, MAX_TOKENS if (m := body.max_tokens) is None else m)
        )
        if body.logprobs is not None:
            changes["logprobs"] = body.logprobs
            changes |= {"prompt_logprobs": body.logprobs} if body.echo else {}
        choices = choices_of(served, body, changes)

        def encode() -> tuple[list[EngineRequest], list[str]]:
            requests, shown = [], []
            for prompt in prompts:
                several = choices.requests(served.llm.request, prompt, options)
                served.llm.check(several[0])
                requests += several
                is_text = isinstance(prompt, str)
                text = prompt if is_text else served.llm.tokenizer.decode(prompt)
                shown += [text if body.echo else ""] * len(several)
            return requests, shown

        requests, shown = await served.in_thread(facts.client, encode)
    except QwenkitError as error:
        raise described(error, "prompt") from error
    if body.logprobs is not None:
        check_logprobs(served, requests, streamed=bool(body.stream))
    per_prompt = len(requests) // len(prompts)
    return Completion(
        served=served,
        facts=facts,
        body=body,
        target=target,
        choices=choices,
        answers=Answers(served, facts, requests, [i // per_prompt for i in range(len(requests))]),
        shown=shown,
        usage_in_stream=usage_in_stream,
        id=f"cmpl-{secrets.token_hex(12)}",
        created=int(time.time()),
    )


async def answer(completion: Completion, stream: AsyncEventStream) -> dict[str, Any]:
    """The whole answer, when all of it has come; see `chat.answer`."""
    answers, texts = completion.answers, completion.texts()
    tallies = [Tally() for _ in texts]
    pieces: list[list[str]] = [[] for _ in texts]
    logprobs: list[dict[str, list[Json]] | None] = [None for _ in texts]
    async for batch in answers.batches(stream):
        for place, one in batch:
            tallies[place].push(one)
            text, more = texts[place].push([one])
            pieces[place].append(text)
            logprobs[place] = _joined(logprobs[place], more)
    listed: list[dict[str, Any]] = []
    per_prompt = len(texts) // (answers.prompts[-1] + 1)
    for first in range(0, len(texts), per_prompt):
        means = [tally.mean_logprob for tally in tallies[first : first + per_prompt]]
        for place in (first + ranked for ranked in completion.choices.ranked(means)):
            whole, finish = "".join(pieces[place]), tallies[place].finish
            listed.append(_choice(completion, len(listed), whole, logprobs[place], finish))
    if completion.facts.prompt is not None:
        completion.facts.replies += [choice["text"] for choice in listed]
    return {**completion.head(), "choices": listed, "usage": _usage(completion)}


def _joined(
    before: dict[str, list[Json]] | None, more: dict[str, list[Json]] | None
) -> dict[str, list[Json]] | None:
    if before is None or more is None:
        return more if before is None else before
    for name, values in more.items():
        before[name] += values
    return before


async def stream_pieces(completion: Completion) -> AsyncGenerator[bytes]:
    """The answers as server-sent events: what comes of each, why it ended; the counts if they were
    asked for; [DONE].
    """
    head = compact(completion.head())[:-1]
    tail = ',"usage":null}' if completion.usage_in_stream else "}"
    texts = completion.texts()
    try:
        async with completion.answers.running() as stream:
            yield b""  # all is well so far: the head may be sent
            async for batch in completion.answers.batches(stream):
                by_place: dict[int, list[Event]] = {}
                for place, one in batch:
                    by_place.setdefault(place, []).append(one)
                pieces = []
                for place, events in by_place.items():
                    text, logprobs = texts[place].push(events)
                    finish = texts[place].finish
                    if not text and finish is None and not (logprobs and logprobs["tokens"]):
                        continue
                    choice = assembled(_choice(completion, place, text, logprobs, finish))
                    pieces.append(event(f'{head},"choices":[{choice}]{tail}'))
                    if completion.facts.prompt is not None:
                        completion.facts.replies.append(text)
                yield b"".join(pieces)
    except QwenkitError as error:
        raise described(error, "prompt") from error
    if completion.usage_in_stream:
        yield event(f'{head},"choices":[],"usage":{compact(_usage(completion))}}}')
    yield DONE


def _choice(
    completion: Completion,
    index: int,
    text: str,
    logprobs: dict[str, list[Json]] | None,
    finish: FinishEvent | None,
) -> dict[str, Any]:
    choice = {
        "text": text,
        "index": index,
        "logprobs": logprobs,
        "finish_reason": None if finish is None else finish.reason,
    }
    if finish is None:
        return choice
    if completion.body.max_tokens == 0:
        return choice | {"finish_reason": "length"}
    return choice | stop_reason(completion.choices.sampling, finish.reason, finish.matched_stop)


def _usage(completion: Completion) -> dict[str, Any]:
    if completion.body.max_tokens == 0:
        completion.facts.completion_tokens = 0  # one was computed, for the prompt's sake
    return usage_of(completion.facts)


def _check(body: CompletionRequest, prompts: Sequence[Any], served: Served) -> None:
    most = served.settings.max_prompts
    if len(prompts) > most:
        message = f"prompt: got {len(prompts)} prompts; at most {most} may come in one request."
        raise ApiError(400, message, "prompt", "invalid_value")
    for place, prompt in enumerate(prompts):
        if prompt == "":
            where = "prompt" if len(prompts) == 1 else f"prompt[{place}]"
            raise ApiError(400, f"{where}: the prompt is empty.", "prompt", "invalid_value")
    if body.max_tokens == 0 and not body.echo:
        message = "max_tokens: 0 asks for nothing, unless the prompt is to be echoed."
        raise ApiError(400, message, "max_tokens", "invalid_value")
