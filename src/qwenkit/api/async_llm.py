"""The same model for asyncio code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Self, overload

from qwenkit.api.inputs import Messages, Options, Prompt, Prompts, Sampling, Tools, several_prompts
from qwenkit.api.session import Session, Vectors
from qwenkit.engine.collector import Collector
from qwenkit.engine.request import Request
from qwenkit.types.completion import Completion
from qwenkit.types.events import Event, FinishEvent


class AsyncLLM(Session):
    """The same model for asyncio code; several requests run together in one engine."""

    def stream(
        self, prompt: Prompt, sampling: Sampling = None, *, options: Options = None
    ) -> AsyncIterator[Event]:
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
    ) -> AsyncIterator[Event]:
        """Events of the assistant's next turn; see `LLM.stream_chat`."""
        request = self._chat_request(messages, sampling, tools, continue_final_message, options)
        return self._service.astream(request)

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
        requests = [self._request(prompt, sampling, options) for prompt in several_prompts(prompts)]
        return list(await asyncio.gather(*(self._complete(request) for request in requests)))

    async def chat(
        self,
        messages: Messages,
        sampling: Sampling = None,
        *,
        tools: Tools = (),
        continue_final_message: bool = False,
        options: Options = None,
    ) -> Completion:
        """The assistant's next turn; see `LLM.chat`."""
        request = self._chat_request(messages, sampling, tools, continue_final_message, options)
        return await self._complete(request)

    async def embed(
        self,
        prompts: str | Prompts,
        *,
        pooling: str = "last",
        normalize: bool = True,
        options: Options = None,
    ) -> Vectors:
        """A vector for each text or id list; see `LLM.embed`."""
        requests = self._embedding_requests(prompts, pooling, normalize, options)
        return self._vectors(await asyncio.gather(*(self._end(request) for request in requests)))

    async def close(self) -> None:
        """Stop the engine; running requests end with the reason "abort"."""
        self._service.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

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
