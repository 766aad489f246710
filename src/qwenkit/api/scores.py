"""How likely continuations are, asked of the engine, which computes equal contexts once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwenkit.api.inputs import MakeRequest, Options, Prompt, prompt_ids
from qwenkit.engine.request import Request
from qwenkit.errors import QwenkitError, RequestError
from qwenkit.score import Score
from qwenkit.types.events import Event, FinishEvent, PromptEvent, TokenLogprob
from qwenkit.types.protocols import Tokenizer
from qwenkit.types.record import ModelRecord
from qwenkit.types.sampling import SamplingParams

Pairs = Iterable[tuple[Prompt, Prompt]]


def score_requests(
    make: MakeRequest, pairs: Pairs, tokenizer: Tokenizer, record: ModelRecord, options: Options
) -> list[Request]:
    """One request for each pair of a context and its continuation."""
    first = record.bos_token_id if record.bos_token_id is not None else record.eos_token_id
    plain = SamplingParams(max_tokens=1, seed=0, prompt_logprobs=1)  # nothing is sampled
    requests = []
    for context, continuation in _pairs(pairs):
        ids, length = split_pair(context, continuation, tokenizer, first)
        requests.append(replace(make(ids, plain, options), scored_from=length))
    return requests


def _pairs(given: object) -> Iterator[tuple[Any, Any]]:
    """Pairs, or RequestError where something is none."""
    expected = "expected a list of pairs, each a context and its continuation"
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise RequestError("pairs", f"{expected}; got {given!r:.80}.")
    for pair in given:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RequestError("pairs", f"{expected}; got {pair!r:.80} among them.")
        yield pair[0], pair[1]


def split_pair(
    context: Prompt, continuation: Prompt, tokenizer: Tokenizer, first_id: int | None
) -> tuple[list[int], int]:
    """The ids of a context with its continuation, and how many of them are the context.

    Two texts are encoded as one and parted where the context's own ids end; spaces at its end are
    the continuation's, whose first token begins with them. `first_id` stands for an empty context.
    Raises RequestError where either has no token.
    """
    if isinstance(context, str) and isinstance(continuation, str):
        stripped = context.rstrip()
        whole = tokenizer.encode(context + continuation)
        count = len(tokenizer.encode(stripped))
        ids, length = whole, min(count, len(whole))
    elif isinstance(context, str) or isinstance(continuation, str):
        raise RequestError("pairs", "give two texts or two lists of ids, not one of each.")
    else:
        before = prompt_ids(context)
        ids, length = [*before, *prompt_ids(continuation)], len(before)
    if length == 0 and first_id is not None:
        ids, length = [first_id, *ids], 1
    if length == 0:
        raise RequestError("pairs", "the context is empty, and this model has no token for that.")
    if length == len(ids):
        raise RequestError("pairs", "the continuation is empty; there is nothing to score.")
    return ids, length


def collect(events: Sequence[Event], tokens: Sequence[int]) -> Score:
    """The score of `tokens` from the events of its request. Raises QwenkitError if that failed."""
    finish = events[-1]
    assert isinstance(finish, FinishEvent), "every accepted request ends in a FinishEvent"
    if finish.reason != "stop":
        raise QwenkitError(finish.error or f"a request ended early: {finish.reason}.")
    parts = (event.logprobs for event in events if isinstance(event, PromptEvent))
    found: list[TokenLogprob] = [each for part in parts for each in part if each is not None]
    logprobs = tuple(each.logprob for each in found)
    return Score(
        logprob_sum=math.fsum(logprobs),
        token_logprobs=logprobs,
        is_greedy=all(each.logprob >= each.top[0][1] for each in found),
        tokens=tuple(tokens),
    )
