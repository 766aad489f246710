"""The engine: requests in, events out, one step at a time.

Not thread-safe and knows no thread; `service` gives it one.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from qwenkit.engine.blocks import BlockPool
from qwenkit.engine.constrain import Grammars, Matcher
from qwenkit.engine.kv import KV_DTYPES
from qwenkit.engine.request import Limits, Request, check_request, stop_ids
from qwenkit.engine.runner import Runner
from qwenkit.engine.sampler import Choice, Sampler
from qwenkit.engine.scheduler import Chunk, Scheduler, SchedulerStatus
from qwenkit.engine.served import ServedModel
from qwenkit.engine.text import Ending, Output
from qwenkit.errors import NonFiniteError, QwenkitError, RequestError, UsageError, suggest
from qwenkit.types.events import Event, FinishEvent, TokenEvent, Usage
from qwenkit.types.extension import Extension, RopeMode
from qwenkit.types.protocols import Tokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Sizes of one engine.

    `block_tokens` is the number of tokens in one block of the KV cache, `kv_cache_tokens` the size
    of the whole cache, rounded up to whole blocks (None: one sequence of the full context, or many
    shorter ones).
    `max_batch_tokens` bounds the tokens computed in one step, so a longer prompt is computed in
    chunks of that size; `max_sequences` bounds the requests that run at the same time.
    `kv_dtype` "fp32", "bf16" or "int8" is what keys and values are kept in; "auto" is what the
    model computes in. `reference_ops` runs every op's torch reference, whatever backends are
    registered.

    Raises UsageError naming the setting on construction.
    """

    block_tokens: int = 16
    kv_cache_tokens: int | None = None
    max_batch_tokens: int = 512
    max_sequences: int = 64
    kv_dtype: str = "auto"
    reference_ops: bool = False

    def __post_init__(self) -> None:
        for name in ("block_tokens", "kv_cache_tokens", "max_batch_tokens", "max_sequences"):
            value = getattr(self, name)
            if value is None and name == "kv_cache_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name}: expected a whole number of at least 1, got {value!r}.")
        if self.kv_dtype not in KV_DTYPES:
            raise UsageError(
                f"kv_dtype: got {self.kv_dtype!r}. {suggest(self.kv_dtype, KV_DTYPES)}"
            )
        if self.max_sequences > self.max_batch_tokens:
            raise UsageError(
                f"max_sequences: {self.max_sequences} is above max_batch_tokens "
                f"{self.max_batch_tokens}; every running sequence needs a token in each step."
            )

    def num_blocks(self, context_tokens: int) -> int:
        """Blocks of the cache, for a model whose sequences have at most `context_tokens`."""
        tokens = context_tokens if self.kv_cache_tokens is None else self.kv_cache_tokens
        return -(-tokens // self.block_tokens)


@dataclass(frozen=True, slots=True)
class _Active:
    """What the engine keeps of an accepted request beside its sequence."""

    request: Request
    sampler: Sampler
    output: Output
    extension: Extension
    matcher: Matcher | None = None

    def choose(self, logits: torch.Tensor) -> Choice:
        """The next token, from logits [vocab_rows], as sampling and constraint have it."""
        if self.matcher is None:
            return self.sampler.choose(logits)
        choice = self.sampler.choose(logits, self.matcher.mask())
        self.matcher.consume(choice.token_id)
        return choice


class Engine:
    """Serves requests with one model.

    `stop_token_ids`, `context_tokens` and `trained_tokens` are the model record's; `rope` says when
    the trained length is extended: for each request as it needs, decided when it is added, or as
    the model's config says. `device` is where the model is; `layer_devices` says it of each layer
    where they are on several, `device` then of the embedding.
    Every accepted request yields token events and then exactly one finish event; what goes wrong
    with one of them ends that one only.
    """

    def __init__(
        self,
        model: ServedModel,
        tokenizer: Tokenizer,
        settings: EngineSettings,
        *,
        stop_token_ids: Iterable[int],
        context_tokens: int,
        trained_tokens: int | None = None,
        rope: RopeMode = "per-request",
        device: torch.device | str = "cpu",
        layer_devices: Sequence[str] | None = None,
    ) -> None:
        num_blocks = settings.num_blocks(context_tokens)
        self.limits = Limits(
            context_tokens=context_tokens,
            cache_tokens=num_blocks * settings.block_tokens,
            vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
            position=model.config.position,
            trained_tokens=trained_tokens,
            rope=rope,
        )
        self._tokenizer = tokenizer
        self._model_stops = tuple(i for i in stop_token_ids if 0 <= i < self.limits.vocab_size)
        self._device = torch.device(device)
        self._runner = Runner(
            model,
            num_blocks=num_blocks,
            block_tokens=settings.block_tokens,
            device=self._device,
            reference_ops=settings.reference_ops,
            layer_devices=None if layer_devices is None else list(map(torch.device, layer_devices)),
            kv_dtype=settings.kv_dtype,
        )
        # Behind the cache, which is refused at once where the pool alone would fill the memory.
        self._scheduler = Scheduler(
            BlockPool(num_blocks),
            block_tokens=settings.block_tokens,
            max_batch_tokens=settings.max_batch_tokens,
            max_sequences=settings.max_sequences,
        )
        self._active: dict[str, _Active] = {}
        self._grammars = Grammars(tokenizer, self.limits.vocab_size)

    @property
    def has_work(self) -> bool:
        """True while a step would do something."""
        return self._scheduler.has_work

    def status(self) -> SchedulerStatus:
        """How busy the engine is."""
        return self._scheduler.status()

    def check(self, request: Request) -> None:
        """Raise RequestError if the request could never be served. Any thread may ask."""
        check_request(request, self.limits)
        stops = stop_ids(request.sampling, self._model_stops, self._tokenizer.control_tokens)
        if request.sampling.min_tokens and len(stops) >= self.limits.vocab_size:
            raise RequestError(
                "min_tokens", "every token of the vocabulary is a stop token, so none could start."
            )
        if request.sampling.constraint is not None and not stops:
            raise RequestError(
                "constraint", "there is no stop token to end with; drop ignore_eos or name one."
            )

    def prepare(self, request: Request) -> Matcher | None:
        """Check a request and compile its constraint, if it has one, which may take a moment: any
        thread but the engine's should. Raises RequestError, MissingDependencyError.
        """
        self.check(request)
        constraint = request.sampling.constraint
        if constraint is None:
            return None
        stops = stop_ids(request.sampling, self._model_stops, self._tokenizer.control_tokens)
        return self._grammars.matcher(constraint, stops)

    def add(self, request: Request, matcher: Matcher | None = None) -> Request:
        """Queue a request; return it as accepted, with the seed it got if it named none. `matcher`
        is what `prepare` gave for it; None: it is prepared here.

        Raises RequestError when it cannot be served or its id is in use.
        """
        if matcher is None:
            matcher = self.prepare(request)
        if request.id in self._active:
            raise RequestError("id", f"request {request.id!r} is already being served.")
        seed = request.sampling.seed
        if seed is None:
            seed = secrets.randbits(63)
            request = dataclasses.replace(request, sampling=request.sampling.replace(seed=seed))
        stops = stop_ids(request.sampling, self._model_stops, self._tokenizer.control_tokens)
        sampler = Sampler(
            request.sampling,
            prompt_ids=request.prompt_ids,
            seed=seed,
            vocab_size=self.limits.vocab_size,
            stop_ids=stops,
        )
        output = Output(
            self._tokenizer.stream(),
            request.sampling,
            stop_ids=stops,
            max_tokens=self.limits.output_tokens(request),
        )
        extension = self.limits.extension(request)
        self._active[request.id] = _Active(request, sampler, output, extension, matcher)
        self._scheduler.add(request.id, request.prompt_ids, extension)
        return request

    def step(self) -> list[Event]:
        """Compute the next tokens of some requests and tell what came of it.

        What the model raises comes out of here with all requests as they were: step again, or end
        them with `abort_all`.
        """
        plan = self._scheduler.schedule()
        if not plan.chunks:
            return []
        logits = self._runner.run(plan)  # [rows, vocab_size]
        events: list[Event] = []
        sampled: dict[str, Choice] = {}
        chunks = [chunk for chunk in plan.chunks if chunk.sample]
        for chunk, row in zip(chunks, logits, strict=True):
            try:
                sampled[chunk.request_id] = self._active[chunk.request_id].choose(row)
            except NonFiniteError as error:
                events.append(self._fail(chunk.request_id, self._located(error, chunk)))
            except Exception as error:
                events.append(self._fail(chunk.request_id, error))
        self._scheduler.apply(plan, {name: choice.token_id for name, choice in sampled.items()})
        for request_id, choice in sampled.items():
            try:
                events += self._emit(request_id, choice)
            except Exception as error:
                events.append(self._fail(request_id, error))
        return events

    def abort(self, request_id: str) -> FinishEvent | None:
        """End a request and free its blocks at once; None if it is not being served (any more)."""
        if request_id not in self._active:
            return None
        return self._finish(request_id, Ending("abort"))

    def abort_all(self, *, error: str | None = None) -> list[FinishEvent]:
        """End every request, with reason "error" if `error` says what happened."""
        ending = Ending("abort" if error is None else "error")
        return [self._finish(name, ending, error) for name in self._scheduler.request_ids]

    def _emit(self, request_id: str, choice: Choice) -> list[Event]:
        text, ending = self._active[request_id].output.push(choice.token_id)
        token = TokenEvent(request_id, choice.token_id, text, choice.logprob, choice.top_logprobs)
        return [token] if ending is None else [token, self._finish(request_id, ending)]

    def _located(self, error: NonFiniteError, chunk: Chunk) -> Exception:
        """The same error, saying where it arose too."""
        prompt_ids = self._active[chunk.request_id].request.prompt_ids
        try:
            where = self._runner.locate(chunk, prompt_ids, chunk.start + len(chunk.token_ids) - 1)
        except Exception as failure:  # what is known must not be lost over what is not
            _log.error("it could not be found where a number went wrong", exc_info=failure)
            return error
        return NonFiniteError(f"{error} {where}")

    def _fail(self, request_id: str, error: Exception) -> FinishEvent:
        return self._finish(request_id, Ending("error"), _describe(error))

    def _finish(self, request_id: str, ending: Ending, error: str | None = None) -> FinishEvent:
        active = self._active.pop(request_id)
        self._scheduler.remove(request_id)
        try:
            text, ending = active.output.finish(ending)
        except Exception as failure:  # of the tokenizer's stream
            text, ending, error = "", Ending("error"), error or _describe(failure)
        return FinishEvent(
            request_id=request_id,
            reason=ending.reason,
            text=text,
            usage=Usage(
                len(active.request.prompt_ids), active.output.tokens, extension=active.extension
            ),
            matched_stop=ending.matched_stop,
            error=error,
        )


def _describe(error: Exception) -> str:
    if not isinstance(error, QwenkitError):  # a fault of the program: keep the trace
        _log.error("a request failed", exc_info=error)
    return f"{type(error).__name__}: {error}"
