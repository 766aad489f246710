"""The engine: requests in, events out, one step at a time.

Not thread-safe and knows no thread; `service` gives it one.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from qwenkit.adapters.bank import Piece
from qwenkit.adapters.peft_files import LoraAdapter
from qwenkit.engine.active import Active, chosen_together, describe
from qwenkit.engine.blocks import BlockPool
from qwenkit.engine.constrain import Grammars, Matcher
from qwenkit.engine.plan import Chunk, Plan, SchedulerStatus
from qwenkit.engine.request import Limits, Request, check_request, stop_ids
from qwenkit.engine.runner import NO_ROWS, Runner
from qwenkit.engine.scheduler import Scheduler
from qwenkit.engine.served import ServedModel
from qwenkit.engine.settings import EngineSettings
from qwenkit.engine.speculative import Drafter, PromptLookup
from qwenkit.engine.text import Ending
from qwenkit.errors import NonFiniteError, RequestError
from qwenkit.types.events import Event, FinishEvent
from qwenkit.types.extension import RopeMode
from qwenkit.types.protocols import Tokenizer

_log = logging.getLogger(__name__)


class Engine:
    """Serves requests with one model.

    `stop_token_ids`, `context_tokens` and `trained_tokens` are the model record's; `rope` says when
    the trained length is extended: for each request as it needs, decided when it is added, or as
    the model's config says. `device` is where the model is; `layer_devices` says it of each layer
    where they are on several, `device` then of the embedding. `drafter` guesses tokens.
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
        drafter: Drafter | None = None,
        clock: Callable[[], float] = time.monotonic,
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
            max_mixed_tokens=settings.max_mixed_tokens,
            prefix_cache=settings.prefix_cache,
        )
        self._drafter = drafter
        if drafter is None and settings.speculation == "prompt-lookup":
            self._drafter = PromptLookup()
        self._clock = clock
        self._active: dict[str, Active] = {}
        self._untold: list[FinishEvent] = []  # so that a step that raises loses none
        self._grammars = Grammars(tokenizer, self.limits.vocab_size)

    @property
    def has_work(self) -> bool:
        """True while a step would do something."""
        return self._scheduler.has_work

    def status(self) -> SchedulerStatus:
        """How busy the engine is."""
        return self._scheduler.status()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters. Any thread may ask."""
        return self._runner.adapters.names

    def adapter_key(self, name: str | None) -> int:
        """A number for what is loaded under this name now, never used again; 0 for None. Raises
        RequestError naming the loaded ones. Any thread may ask.
        """
        return self._runner.adapters.key(name)

    def prepare_adapter(self, adapter: LoraAdapter) -> dict[str, Piece]:
        """What `load_adapter` takes. Any thread may ask; raises CheckpointError or UsageError."""
        return self._runner.adapters.prepare(adapter)

    def load_adapter(self, name: str, prepared: dict[str, Piece]) -> None:
        """Serve an adapter under this name from now on. Raises UsageError if the name is in use."""
        self._runner.adapters.add(name, prepared)
        self._runner.adapters_changed()

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter that no request uses. Raises RequestError for an unknown name,
        UsageError while a request that runs or waits needs it.
        """
        users = sum(a.request.options.adapter == name for a in self._active.values())
        self._runner.adapters.remove(name, users=users)
        self._runner.adapters_changed()

    def check(self, request: Request) -> None:
        """Raise RequestError if the request could never be served. Any thread may ask."""
        check_request(request, self.limits)
        self.adapter_key(request.options.adapter)
        stops = self._stop_ids(request)
        if request.sampling.min_tokens and len(stops) >= self.limits.vocab_size:
            raise RequestError(
                "min_tokens", "every token of the vocabulary is a stop token, so none could start."
            )
        constraint = request.sampling.constraint
        if constraint is not None and not stops:
            message = "there is no stop token to end with; drop ignore_eos or name one."
            raise RequestError(constraint.field, message)

    def prepare(self, request: Request) -> Matcher | None:
        """Check a request and compile its constraint, if it has one, which may take a moment: any
        thread but the engine's should. Raises RequestError, MissingDependencyError.
        """
        self.check(request)
        constraint = request.sampling.constraint
        if constraint is None:
            return None
        return self._grammars.matcher(constraint, self._stop_ids(request))

    def add(self, request: Request, matcher: Matcher | None = None) -> Request:
        """Queue a request; return it as accepted, with the seed it got if it named none. `matcher`
        is what `prepare` gave for it; None: it is prepared here.

        Raises RequestError when it cannot be served or its id is in use.
        """
        if matcher is None:
            matcher = self.prepare(request)
        if request.id in self._active:
            raise RequestError("id", f"request {request.id!r} is already being served.")
        if request.sampling.seed is None:
            sampling = request.sampling.replace(seed=secrets.randbits(63))
            request = dataclasses.replace(request, sampling=sampling)
        options = request.options
        cache_key = self.adapter_key(options.adapter), options.cache_salt
        active = Active(
            request,
            self.limits,
            self._tokenizer,
            stop_ids=self._stop_ids(request),
            matcher=matcher,
            deadline_s=None if options.timeout_s is None else self._clock() + options.timeout_s,
        )
        self._active[request.id] = active
        self._scheduler.add(
            request.id,
            active.computed_ids,
            active.extension,
            client=options.client,
            priority=options.priority,
            rows_from=active.rows_from,
            hidden=request.embedding is not None,
            cache_key=cache_key,
        )
        return request

    def step(self) -> list[Event]:
        """Compute the next tokens of some requests and tell what came of it.

        What the model raises comes out of here with all requests as they were: step again, or end
        them with `abort_all`.
        """
        self._end_overdue()
        plan = self._scheduler.schedule(self._drafts())
        rows = self._runner.rows(plan, self._adapter_keys(plan)) if plan.chunks else NO_ROWS
        chosen = chosen_together(self._active, plan, rows)
        events: list[Event] = [*self._take_untold()]
        sampled: dict[str, tuple[int, ...]] = {}
        endings: dict[str, Ending] = {}
        for index, chunk in enumerate(plan.chunks):
            active, token_id = self._active[chunk.request_id], chosen.get(chunk.request_id)
            try:
                taken = active.take(chunk, partial(rows.of, index), token_id)
            except Exception as error:
                if isinstance(error, NonFiniteError):
                    error = self._located(error, chunk)
                events.append(self._finish(chunk.request_id, Ending("error"), describe(error)))
                continue
            events += taken.events
            sampled[chunk.request_id] = taken.token_ids
            if chunk.drafted and self._drafter is not None:
                accepted = max(0, len(taken.token_ids) - 1)
                self._drafter.observe(chunk.request_id, chunk.drafted, accepted)
            if taken.ending is not None:
                endings[chunk.request_id] = taken.ending
        self._scheduler.apply(plan, sampled)
        return events + [self._finish(name, ending) for name, ending in endings.items()]

    def abort(self, request_id: str) -> FinishEvent | None:
        """End a request and free its blocks at once; None if it is not being served (any more)."""
        if request_id not in self._active:
            return None
        return self._finish(request_id, Ending("abort"))

    def abort_all(self, *, error: str | None = None) -> list[FinishEvent]:
        """End every request, with reason "error" if `error` says what happened."""
        ending = Ending("abort" if error is None else "error")
        self._untold += [self._finish(name, ending, error) for name in self._scheduler.request_ids]
        return self._take_untold()

    def _drafts(self) -> dict[str, tuple[int, ...]]:
        """Guesses of what decoding sequences go on with; the last token needs none behind it."""
        if self._drafter is None:
            return {}
        decoding = list(self._scheduler.decoding())
        room = {name: self._active[name].output.room - 1 for name, _ in decoding}
        return self._drafter.propose(decoding, room)

    def _end_overdue(self) -> None:
        now_s = self._clock()
        for name, active in list(self._active.items()):
            if active.deadline_s is not None and active.deadline_s <= now_s:
                self._untold.append(self._finish(name, Ending("timeout")))

    def _take_untold(self) -> list[FinishEvent]:
        ended, self._untold = self._untold, []
        return ended

    def _adapter_keys(self, plan: Plan) -> tuple[int, ...]:
        """Each chunk's adapter; empty where none is loaded."""
        if not self.adapters:
            return ()
        options = (self._active[chunk.request_id].request.options for chunk in plan.chunks)
        return tuple(self.adapter_key(one.adapter) for one in options)

    def _stop_ids(self, request: Request) -> dict[int, str | int]:
        return stop_ids(request.sampling, self._model_stops, self._tokenizer.control_tokens)

    def _located(self, error: NonFiniteError, chunk: Chunk) -> Exception:
        """The same error, saying where it arose too."""
        request = self._active[chunk.request_id].request
        try:
            key = self.adapter_key(request.options.adapter)
            where = self._runner.locate(chunk, request.prompt_ids, key)
        except Exception as failure:  # what is known must not be lost over what is not
            _log.error("it could not be found where a number went wrong", exc_info=failure)
            return error
        return NonFiniteError(f"{error} {where}")

    def _finish(self, request_id: str, ending: Ending, error: str | None = None) -> FinishEvent:
        active = self._active.pop(request_id)
        if self._drafter is not None:
            self._drafter.forget(request_id)
        sequence = self._scheduler.remove(request_id, spoiled=ending.reason == "error")
        return active.finish(ending, error=error, cached_tokens=sequence.cached or 0)
