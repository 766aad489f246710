"""Two things that save an engine work, each measured with and without, on the same requests.

Questions about one long text show the prefix cache. Small changes of code, where most of the answer
stands in the prompt (`edits.json`), show prompt lookup, and writing, where nothing does, shows what
that costs when it cannot help. Both leave every answer as it is, which is checked.
"""

from __future__ import annotations

import json
import random
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qwenkit.api import LLM
from qwenkit.bench.serving_overhead import new_engine
from qwenkit.engine.request import Request
from qwenkit.engine.service import EngineService
from qwenkit.errors import QwenkitError
from qwenkit.types.events import Event, FinishEvent, TokenEvent
from qwenkit.types.options import RequestOptions
from qwenkit.types.sampling import SamplingParams

_FILE = Path(__file__).with_name("edits.json")
_EDIT_MARGIN = 8  # tokens that an edited text may be longer by
_WRITING_TOKENS = 128

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Seconds of each turn for the same requests; `ratio` is the median of `without` over `with`.
    `share` is that of the prompts' tokens that were cached, or of the guesses that stood.
    """

    what: str
    requests: int
    prompt_tokens: int
    answer_tokens: int
    without_s: tuple[float, ...]
    with_s: tuple[float, ...]
    share: float

    @property
    def ratio(self) -> float:
        """How many times faster it is."""
        pairs = zip(self.without_s, self.with_s, strict=True)
        return statistics.median(without / with_it for without, with_it in pairs)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"ratio": self.ratio}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixWorkload:
    """`questions` of `question_tokens` each behind a header of `header_tokens`, all asked at once,
    each answered with `answer_tokens`.
    """

    header_tokens: int = 2000
    questions: int = 32
    question_tokens: int = 32
    answer_tokens: int = 16

    def prompts(self, vocab_size: int) -> list[tuple[int, ...]]:
        """Random ids, the same ones each time."""
        generator = random.Random(0)

        def ids(count: int) -> tuple[int, ...]:
            return tuple(generator.randrange(vocab_size) for _ in range(count))

        header = ids(self.header_tokens)
        return [header + ids(self.question_tokens) for _ in range(self.questions)]


def compare_prefix(llm: LLM, workload: PrefixWorkload, *, turns: int, say: Say) -> Comparison:
    """Time the questions with the prefix cache and without, all of them together.

    Raises QwenkitError unless tokens and their log-probabilities are the same, bit for bit.
    """
    prompts = workload.prompts(llm.tokenizer.vocab_size - len(llm.tokenizer.control_tokens))
    tokens = workload.answer_tokens
    sampling = SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=0, seed=0
    )
    block = llm.engine_settings.block_tokens
    room = len(prompts) * (len(prompts[0]) + tokens + 2 * block)
    settings = replace(llm.engine_settings, kv_cache_tokens=room)
    engines = [new_engine(llm, replace(settings, prefix_cache=kept)) for kept in (False, True)]
    with EngineService(engines[0]) as without, EngineService(engines[1]) as with_it:
        for service in (without, with_it):  # warm: steps are recorded, pages touched
            _serve(service, prompts[:1], sampling)
        pair = _Pair(without, with_it)
        for turn in range(turns):
            say(f"prefix cache, turn {turn + 1} of {turns}")
            pair.take_turn("prefix cache", [prompts], [sampling])
    prompt_tokens = sum(map(len, prompts))
    return Comparison(
        what="prefix cache",
        requests=len(prompts),
        prompt_tokens=prompt_tokens,
        answer_tokens=pair.tokens,
        without_s=tuple(pair.without_s),
        with_s=tuple(pair.with_s),
        share=pair.cached_tokens / prompt_tokens,
    )


def compare_lookup(llm: LLM, *, turns: int, say: Say) -> list[Comparison]:
    """Time the edits, greedy, and the writing, sampled, with prompt lookup and without, one request
    after another. Raises QwenkitError unless the tokens are the same.
    """
    work = json.loads(_FILE.read_text(encoding="utf-8"))
    edits = [edit_prompt(edit) for edit in work["edits"]]
    lengths = [len(llm.tokenizer.encode(edit["code"])) + _EDIT_MARGIN for edit in work["edits"]]
    copying = [
        SamplingParams(temperature=0.0, max_tokens=length, stop=("```",), seed=0)
        for length in lengths
    ]
    writing = [[{"role": "user", "content": text}] for text in work["writing"]]
    free = [
        SamplingParams(temperature=1.0, max_tokens=_WRITING_TOKENS, ignore_eos=True, seed=seed)
        for seed in range(len(writing))
    ]
    edit_ids = [tuple(llm.tokenizer.encode(text)) for text in edits]
    writing_ids = [tuple(llm.render(messages).ids) for messages in writing]
    return [
        _compare_lookup(llm, "code edits", edit_ids, copying, turns=turns, say=say),
        _compare_lookup(llm, "writing", writing_ids, free, turns=turns, say=say),
    ]


def edit_prompt(edit: dict[str, str]) -> str:
    """A text whose likeliest continuation is the code of `edit` with one name for another."""
    return (
        f"The code before:\n\n```\n{edit['code']}```\n\n"
        f"The same code after renaming `{edit['from']}` to `{edit['to']}`:\n\n```\n"
    )


def _compare_lookup(
    llm: LLM,
    what: str,
    prompts: Sequence[tuple[int, ...]],
    samplings: Sequence[SamplingParams],
    *,
    turns: int,
    say: Say,
) -> Comparison:
    longest = max(len(p) + (s.max_tokens or 0) for p, s in zip(prompts, samplings, strict=True))
    room = longest + 2 * llm.engine_settings.block_tokens
    settings = replace(llm.engine_settings, kv_cache_tokens=room, prefix_cache=False)
    looking = new_engine(llm, replace(settings, speculation="prompt-lookup"))
    with (
        EngineService(new_engine(llm, settings)) as without,
        EngineService(looking) as with_it,
    ):
        each = [[prompt] for prompt in prompts]
        _Pair(without, with_it).take_turn(what, each, samplings)  # warm: steps are recorded
        pair = _Pair(without, with_it)
        for turn in range(turns):
            say(f"prompt lookup, {what}, turn {turn + 1} of {turns}")
            pair.take_turn(what, each, samplings)
        status = with_it.call(lambda engine: engine.status())
    return Comparison(
        what=f"prompt lookup, {what}",
        requests=len(prompts),
        prompt_tokens=sum(map(len, prompts)),
        answer_tokens=pair.tokens,
        without_s=tuple(pair.without_s),
        with_s=tuple(pair.with_s),
        share=status.accepted_tokens / max(1, status.drafted_tokens),
    )


class _Pair:
    """Two engines that serve the same requests in turns, and must give the same answers."""

    def __init__(self, without: EngineService, with_it: EngineService) -> None:
        self._services = without, with_it
        self.without_s: list[float] = []
        self.with_s: list[float] = []
        self.tokens = self.cached_tokens = 0  # of one turn

    def take_turn(
        self,
        what: str,
        groups: Sequence[Sequence[tuple[int, ...]]],
        samplings: Sequence[SamplingParams],
    ) -> None:
        """Serve one group of prompts after another, each by one engine and then by the other."""
        seconds = [0.0, 0.0]
        self.tokens = self.cached_tokens = 0
        for prompts, sampling in zip(groups, samplings, strict=True):
            answers = []
            for side, service in enumerate(self._services):
                start_s = time.perf_counter()
                answers.append(_serve(service, prompts, sampling))
                seconds[side] += time.perf_counter() - start_s
            if answers[0].tokens != answers[1].tokens:
                raise QwenkitError(f"{what}: the answers with it and without it are not the same.")
            self.tokens += sum(map(len, answers[1].tokens))
            self.cached_tokens += answers[1].cached_tokens
        self.without_s.append(seconds[0])
        self.with_s.append(seconds[1])


@dataclass(frozen=True, slots=True)
class _Answers:
    """The tokens of each request, with their log-probabilities where they were asked for, and how
    many tokens of all prompts were cached.
    """

    tokens: list[list[tuple[int, float | None]]]
    cached_tokens: int


def _serve(
    service: EngineService, prompts: Sequence[tuple[int, ...]], sampling: SamplingParams
) -> _Answers:
    """Serve prompts together; nothing that was cached before is found. Raises QwenkitError."""
    options = RequestOptions(cache_salt=secrets.token_hex(8))
    names = [secrets.token_hex(8) for _ in prompts]
    requests = [Request(n, ids, sampling, options) for n, ids in zip(names, prompts, strict=True)]
    answers = service.generate(requests)
    ends = [event for events in answers for event in events if isinstance(event, FinishEvent)]
    for end in ends:
        if end.reason not in ("stop", "length"):
            raise QwenkitError(f"a request ended with {end.reason}: {end.error}")
    return _Answers([_tokens(each) for each in answers], sum(e.usage.cached_tokens for e in ends))


def _tokens(events: Sequence[Event]) -> list[tuple[int, float | None]]:
    return [(e.token_id, e.logprob) for e in events if isinstance(e, TokenEvent)]
