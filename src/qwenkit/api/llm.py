"""A model to talk to from ordinary code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self, overload

from qwenkit.api.inputs import Messages, Options, Prompt, Prompts, Sampling, Tools, several_prompts
from qwenkit.api.session import Session, Vectors
from qwenkit.engine.collector import Collector
from qwenkit.engine.request import Request
from qwenkit.types.completion import Completion
from qwenkit.types.events import Event, FinishEvent


class LLM(Session):
    """A model to talk to from ordinary code, from several threads too; a context manager."""

    def stream(
        self, prompt: Prompt, sampling: Sampling = None, *, options: Options = None
    ) -> Iterator[Event]:
        """Events of a raw completion of text or ids: tokens, then exactly one FinishEvent.

        Closing the iterator aborts the request. Raises RequestError before the first event.
        """
        return self._service.stream(self._request(prompt, sampling, options))

    def stream_chat(
        self,
        messages: Messages,
        sampling: Sampling = None,
        *,
        tools: Tools = (),
        continue_final_message: bool = False,
        options: Options = None,
    ) -> Iterator[Event]:
        """Events of the assistant's next turn; see `stream`."""
        request = self._chat_request(messages, sampling, tools, continue_final_message, options)
        return self._service.stream(request)

    @overload
    def generate(
        self, prompts: str, sampling: Sampling = None, *, options: Options = None
    ) -> Completion: ...
    @overload
    def generate(
        self, prompts: Prompts, sampling: Sampling = None, *, options: Options = None
    ) -> list[Completion]: ...
    def generate(
        self, prompts: str | Prompts, sampling: Sampling = None, *, options: Options = None
    ) -> Completion | list[Completion]:
        """Complete one text, or a list of texts or id lists in one batch (answers in order)."""
        if isinstance(prompts, str):
            return self._complete([self._request(prompts, sampling, options)])[0]
        several = several_prompts(prompts)
        return self._complete([self._request(prompt, sampling, options) for prompt in several])

    def chat(
        self,
        messages: Messages,
        sampling: Sampling = None,
        *,
        tools: Tools = (),
        continue_final_message: bool = False,
        options: Options = None,
    ) -> Completion:
        """The assistant's next turn. Raises RequestError or TemplateError."""
        request = self._chat_request(messages, sampling, tools, continue_final_message, options)
        return self._complete([request])[0]

    def embed(
        self,
        prompts: str | Prompts,
        *,
        pooling: str = "last",
        normalize: bool = True,
        options: Options = None,
    ) -> Vectors:
        """A vector for each text or id list, in order: fp32 [prompts, hidden_size].

        `pooling` "last" takes the normalised hidden state of the last token, "mean" the mean of all
        tokens'; `normalize` gives every vector length one. They run beside whatever else the engine
        serves. Raises RequestError, or QwenkitError when one cannot be computed.
        """
        requests = self._embedding_requests(prompts, pooling, normalize, options)
        events = {event.request_id: event for event in self._service.stream_many(requests)}
        ends = [events[request.id] for request in requests]
        return self._vectors([end for end in ends if isinstance(end, FinishEvent)])

    def close(self) -> None:
        """Stop the engine; running requests end with the reason "abort"."""
        self._service.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        collectors = {request.id: Collector(request) for request in requests}
        for event in self._service.stream_many(requests):
            collectors[event.request_id].add(event)
        return [collectors[request.id].completion() for request in requests]
