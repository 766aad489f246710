"""The same model for asyncio code."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, overload

from qwenkit.api.beam import BeamSettings, likeliest, start_search, step_requests
from qwenkit.api.choices import Choices
from qwenkit.api.embeddings import Vectors, embedding_requests, vectors
from qwenkit.api.inputs import Messages, Options, Prompt, Prompts, Sampling, Tools, several_prompts
from qwenkit.api.replies import AsyncReplyStream, GivenToolOptions
from qwenkit.api.scores import Pairs, collect, score_requests
from qwenkit.api.session import Session
from qwenkit.engine.collector import Collector
from qwenkit.engine.request import Request
from qwenkit.engine.service import AsyncEventStream
from qwenkit.score import Score
from qwenkit.types.completion import BeamCompletion, Completion
from qwenkit.types.events import Event, FinishEvent
from qwenkit.types.sampling import SamplingParams

T = TypeVar("T")


class AsyncLLM(Session):
    """The same model for asyncio code; several requests run together in one engine."""

    def stream(
        self, prompt: Prompt, sampling: Sampling = None, *, options: Options = None
    ) -> AsyncEventStream:
        """Events of a raw completion of text or ids; see `LLM.stream`."""
        return self._service.astream(self._request(prompt, sampling, options))

    def stream_chat(
        self,
        messages: Messages,
        sampling: Sampling = None,
        *,
        tools: Tools = (),
        continue_final_message: bool = False,
        options: Options = None,
    ) -> AsyncEventStream:
        """Bare events of the assistant's next turn; `stream_reply` says what they say."""
        continues = continue_final_message
        prepared = self.prepare_reply(
            messages, sampling, tools=tools, continue_final_message=continues, options=options
        )
        return self._service.astream(prepared.request)

    def stream_reply(
        self,
        messages: Messages,
        sampling: Sampling = None,
        *,
        tools: Tools = (),
        tool_options: GivenToolOptions = None,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        options: Options = None,
    ) -> AsyncReplyStream:
        """Events of the assistant's next turn with what they say; see `LLM.stream_reply`."""
        prepared = self.prepare_reply(
            messages,
            sampling,
            tools=tools,
            tool_options=tool_options,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
            options=options,
        )
        return AsyncReplyStream(self._service.astream(prepared.request), prepared.reader())

    @property
    def is_alive(self) -> bool:
        """False when nothing will be answered any more: after `close`, or when the engine's thread
        has ended. Any thread may ask.
        """
        return self._service.is_alive

    @property
    def busy_s(self) -> float:
        """How long the engine has been at one step; 0 while it waits. Any thread may ask."""
        return self._service.busy_s

    def request(
        self, prompt: Prompt, sampling: Sampling = None, options: Options = None
    ) -> Request:
        """A request to go on with a text or ids. Raises RequestError; whether the engine can take
        it, is found where it is handed over, or by `check`.
        """
        return self._request(prompt, sampling, options)

    def check(self, request: Request) -> None:
        """Raise RequestError for a request that could never be served. Any thread may ask."""
        self._service.engine.check(request)

    def output_tokens(self, request: Request) -> int:
        """Most tokens that a request can be answered with. Any thread may ask."""
        return self._limits.output_tokens(request)

    def stream_requests(self, requests: Iterable[Request]) -> AsyncEventStream:
        """Events of several requests together, each named by its request's id; see
        `request`. If one of them is refused, none is submitted.
        """
        return self._service.astream_many(requests)

    @overload
    async def generate(
        self, prompts: str, sampling: Sampling = None, *, options: Options = None
    ) -> Completion: ...
    @overload
    async def generate(
        self, prompts: Prompts, sampling: Sampling = None, *, options: Options = None
    ) -> list[Completion]: ...
    async def generate(
        self, prompts: str | Prompts, sampling: Sampling = None, *, options: Options = None
    ) -> Completion | list[Completion]:
        """Complete one text, or a list of texts or id lists in one batch (answers in order)."""
        if isinstance(prompts, str):
            return await self._complete(self._request(prompts, sampling, options))
        several = several_prompts(prompts)
        return await self._complete_all([self._request(p, sampling, options) for p in several])

    async def chat(
        self,
        messages: Messages,
        sampling: Sampling = None,
        *,
        tools: Tools = (),
        tool_options: GivenToolOptions = None,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        options: Options = None,
    ) -> Completion:
        """The assistant's next turn; see `LLM.chat`."""
        prepared = self.prepare_reply(
            messages,
            sampling,
            tools=tools,
            tool_options=tool_options,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
            options=options,
        )
        return prepared.completed(await self._complete(prepared.request))

    async def choices(
        self,
        prompt: Prompt,
        sampling: Sampling = None,
        *,
        n: int,
        best_of: int | None = None,
        options: Options = None,
    ) -> list[Completion]:
        """`n` answers to one prompt, or the best of more; see `LLM.choices`."""
        choices = Choices(self.sampling(sampling), n, best_of)
        requests = choices.requests(self._request, prompt, options)
        return choices.chosen(await self._complete_all(requests))

    async def beam_search(
        self,
        prompt: Prompt,
        *,
        width: int,
        max_tokens: int,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        stop_token_ids: tuple[int, ...] = (),
        ignore_eos: bool = False,
        options: Options = None,
    ) -> list[BeamCompletion]:
        """The `width` likeliest continuations of text or ids; see `LLM.beam_search`."""
        settings = BeamSettings(
            width=width,
            max_tokens=max_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        stops = SamplingParams(
            max_tokens=max_tokens, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos, seed=0
        )
        request = self._request(prompt, stops, options)
        search = start_search(request, settings, self._limits, self.record, self.tokenizer)
        while search.open:
            done = await self._complete_all(step_requests(search, request))
            search.advance([likeliest(completion) for completion in done])
        return search.results(self.tokenizer)

    async def load_adapter(
        self, name: str, adapter: str | Path, *, revision: str | None = None, offline: bool = False
    ) -> None:
        """See `LLM.load_adapter`."""
        load = partial(self._load_adapter, revision=revision, offline=offline)
        await asyncio.to_thread(load, name, adapter)

    async def unload_adapter(self, name: str) -> None:
        """See `LLM.unload_adapter`."""
        await asyncio.to_thread(self._unload_adapter, name)

    async def embed(
        self,
        prompts: str | Prompts,
        *,
        pooling: str = "last",
        normalize: bool = True,
        options: Options = None,
    ) -> Vectors:
        """A vector for each text or id list; see `LLM.embed`."""
        requests = embedding_requests(self._request, prompts, pooling, normalize, options)
        ends = await _together(self._end(request) for request in requests)
        return vectors(ends, self.config.hidden_size)

    async def close(self) -> None:
        """Stop the engine; running requests end with the reason "abort"."""
        await asyncio.to_thread(self._service.close)  # it waits for the step that is computed

    def close_now(self) -> None:
        """The same where no event loop runs."""
        self._service.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _complete_all(self, requests: Sequence[Request]) -> list[Completion]:
        return await _together(self._complete(request) for request in requests)

    async def score(self, pairs: Pairs, *, options: Options = None) -> list[Score]:
        """The log-likelihood of each continuation; see `LLM.score`."""
        requests = score_requests(self._request, pairs, self.tokenizer, self.record, options)
        several = await _together(self._events(request) for request in requests)
        return [
            collect(events, one.prompt_ids[one.scored_from :])
            for one, events in zip(requests, several, strict=True)
        ]

    async def _events(self, request: Request) -> list[Event]:
        return [event async for event in self._service.astream(request)]

    async def _end(self, request: Request) -> FinishEvent:
        async for event in self._service.astream(request):
            if isinstance(event, FinishEvent):
                return event
        raise AssertionError("every accepted request ends in a FinishEvent")

    async def _complete(self, request: Request) -> Completion:
        collector = Collector(request)
        async for event in self._service.astream(request):
            collector.add(event)
        return collector.completion()


async def _together(answers: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All answers, in order. If one of them raises, the others' requests are aborted."""
    tasks = [asyncio.create_task(answer) for answer in answers]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()  # does nothing to those that are done
