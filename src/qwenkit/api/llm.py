"""A model to talk to from ordinary code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, overload

from qwenkit.api.bar import bar
from qwenkit.api.beam import BeamSettings, likeliest, start_search, step_requests
from qwenkit.api.choices import Choices
from qwenkit.api.embeddings import Vectors, embedding_requests, vectors
from qwenkit.api.inputs import Messages, Options, Prompt, Prompts, Sampling, Tools, several_prompts
from qwenkit.api.replies import GivenToolOptions, ReplyStream
from qwenkit.api.scores import Pairs, collect, score_requests
from qwenkit.api.session import Session
from qwenkit.engine.collector import Collector
from qwenkit.engine.request import Request
from qwenkit.engine.service import EventStream
from qwenkit.score import Score
from qwenkit.types.completion import BeamCompletion, Completion
from qwenkit.types.events import FinishEvent
from qwenkit.types.sampling import SamplingParams


class LLM(Session):
    """A model to talk to from ordinary code, from several threads too; a context manager."""

    def stream(
        self, prompt: Prompt, sampling: Sampling = None, *, options: Options = None
    ) -> EventStream:
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
    ) -> EventStream:
        """Bare events of the assistant's next turn; `stream_reply` says what they say."""
        continues = continue_final_message
        prepared = self.prepare_reply(
            messages, sampling, tools=tools, continue_final_message=continues, options=options
        )
        return self._service.stream(prepared.request)

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
    ) -> ReplyStream:
        """Events of the assistant's next turn, each with what became certain of its text, thoughts
        and calls of tools; see `prepare_reply`.

        The deltas, joined, do not depend on how the text came. Closing the iterator aborts the
        request. Raises RequestError or TemplateError before the first event.
        """
        prepared = self.prepare_reply(
            messages,
            sampling,
            tools=tools,
            tool_options=tool_options,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
            options=options,
        )
        return ReplyStream(self._service.stream(prepared.request), prepared.reader())

    @overload
    def generate(
        self,
        prompts: str,
        sampling: Sampling = None,
        *,
        options: Options = None,
        progress: bool | None = None,
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        options: Options = None,
        progress: bool | None = None,
    ) -> list[Completion]: ...
    def generate(
        self,
        prompts: str | Prompts,
        sampling: Sampling = None,
        *,
        options: Options = None,
        progress: bool | None = None,
    ) -> Completion | list[Completion]:
        """Complete one text, or a list of texts or id lists in one batch (answers in order).

        `progress` shows a bar on standard error; by default where a list is given and a person
        looks on.
        """
        if isinstance(prompts, str):
            return self._complete([self._request(prompts, sampling, options)])[0]
        several = several_prompts(prompts)
        requests = [self._request(prompt, sampling, options) for prompt in several]
        return self._complete(requests, progress)

    def chat(
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
        """The assistant's next turn, its `reply` told apart into text, thoughts and calls of tools.

        Raises RequestError or TemplateError.
        """
        prepared = self.prepare_reply(
            messages,
            sampling,
            tools=tools,
            tool_options=tool_options,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
            options=options,
        )
        return prepared.completed(self._complete([prepared.request])[0])

    def choices(
        self,
        prompt: Prompt,
        sampling: Sampling = None,
        *,
        n: int,
        best_of: int | None = None,
        options: Options = None,
    ) -> list[Completion]:
        """`n` answers to one prompt, sampled with the request's seed, the next one, and so on.

        They come in the order of their seeds. With `best_of` so many are sampled, and those with
        the highest mean log-probability come, the best first. Each is what its own seed gives when
        it is asked alone. Raises RequestError naming the field; at most 128 run together.
        """
        choices = Choices(self.sampling(sampling), n, best_of)
        requests = choices.requests(self._request, prompt, options)
        return choices.chosen(self._complete(requests))

    def beam_search(
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
        """The `width` likeliest continuations of text or ids that a beam search finds, best first.

        The meaning of `length_penalty` and `early_stopping` is in `api.beam.BeamSettings`. An
        answer ends with the model's stops (but for `ignore_eos`), with one of `stop_token_ids`, or
        after `max_tokens`. Nothing is sampled and no penalty applied. Every step is a request of
        its own: a deadline counts for each, and beyond the trained length each is extended as its
        own length needs. Raises RequestError naming the field, QwenkitError when a step fails.
        """
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
            done = self._complete(step_requests(search, request))
            search.advance([likeliest(completion) for completion in done])
        return search.results(self.tokenizer)

    def load_adapter(
        self, name: str, adapter: str | Path, *, revision: str | None = None, offline: bool = False
    ) -> None:
        """Serve the adapter in a folder of PEFT's layout, or on a hub, under a name from now on:
        requests with the option `adapter` of that name use it, also while others run.

        Raises UsageError for a name in use or an adapter that can only be merged, and as `LLM` and
        `qwenkit.adapter_files.read_adapter`.
        """
        self._load_adapter(name, adapter, revision=revision, offline=offline)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter and free its memory.

        Raises RequestError for an unknown name, UsageError while requests use it: they are neither
        waited for nor ended.
        """
        self._unload_adapter(name)

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
        requests = embedding_requests(self._request, prompts, pooling, normalize, options)
        ends = [events[-1] for events in self._service.generate(requests)]
        finished = [end for end in ends if isinstance(end, FinishEvent)]
        return vectors(finished, self.config.hidden_size)

    def close(self) -> None:
        """Stop the engine; running requests end with the reason "abort"."""
        self._service.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def score(self, pairs: Pairs, *, options: Options = None) -> list[Score]:
        """The log-likelihood of each continuation, given its context: pairs of texts or id lists.

        A context that several pairs share is computed once. Two texts are encoded together, spaces
        at the context's end with the continuation. Raises RequestError, or QwenkitError when one
        cannot be computed.
        """
        requests = score_requests(self._request, pairs, self.tokenizer, self.record, options)
        several = self._service.generate(requests)
        return [
            collect(events, one.prompt_ids[one.scored_from :])
            for one, events in zip(requests, several, strict=True)
        ]

    def _complete(
        self, requests: Sequence[Request], progress: bool | None = False
    ) -> list[Completion]:
        collectors = {request.id: Collector(request) for request in requests}
        with (
            bar(len(requests), progress) as advance,
            self._service.stream_many(requests) as stream,
        ):
            for event in stream:
                collectors[event.request_id].add(event)
                if isinstance(event, FinishEvent):
                    advance(event.usage.completion_tokens)
        return [collectors[request.id].completion() for request in requests]
