"""Room 6: `LLM` and `AsyncLLM`, a loaded model with its engine and chat renderer behind one door.

from qwenkit import LLM
llm = LLM("default")
print(llm.chat([{"role": "user", "content": "What is the capital of France?"}]).text)
"""

from __future__ import annotations

import asyncio
import dataclasses
import numbers
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Self, overload

import torch

from qwenkit.chat.render import Rendered, render
from qwenkit.checkpoint.hub import resolve
from qwenkit.engine.collector import Collector
from qwenkit.engine.engine import Engine, EngineSettings
from qwenkit.engine.request import Request
from qwenkit.engine.service import EngineService
from qwenkit.errors import RequestError, UsageError, suggest
from qwenkit.formats.packed import PackedWeight
from qwenkit.formats.plan import WeightPlan
from qwenkit.kernels import cpu
from qwenkit.load import Loaded, load
from qwenkit.parallel import DeviceMap, GivenMap, connect, plan_devices, read_places
from qwenkit.record import context_limit
from qwenkit.types.completion import Completion
from qwenkit.types.events import Event
from qwenkit.types.extension import rope_mode
from qwenkit.types.messages import Message, Tool, parse_messages, parse_tools
from qwenkit.types.sampling import SamplingParams

COMPUTE = ("auto", "reference")
Sampling = SamplingParams | Mapping[str, Any] | None
Messages = Iterable[Message | Mapping[str, Any]]
Tools = Iterable[Tool | Mapping[str, Any]]
Prompt = str | Sequence[int]
Prompts = list[str] | list[list[int]] | list[Prompt] | tuple[Prompt, ...]


class _Session:
    """What `LLM` and `AsyncLLM` share: one loaded model and one engine."""

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        weights: str = "auto",
        group_size: int | None = None,
        head_weights: str | None = None,
        compute: str = "auto",
        device: str = "cpu",
        device_map: GivenMap | None = None,
        threads: int | None = None,
        pin_threads: bool = False,
        rope: str = "per-request",
        context_tokens: int | None = None,
        kv_cache_tokens: int | None = None,
        kv_dtype: str = "auto",
        offline: bool = False,
        revision: str | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Load `model`: "default", a name on a hub, a folder or a .gguf file.

        `dtype` "auto", "float32" or "bfloat16" is that of the activations. `weights` "auto" runs
        what is stored; "int4", "int8", "bf16" or "fp32" rounds every matrix to nearest at load,
        with `group_size` columns to a scale (32, 64 or 128) and `head_weights` for embedding and
        head (default: int8 with int4). `compute` "auto" uses the fastest kernels of this machine,
        which round activations for int4 and int8 weights, "reference" the readable torch ones.
        `device` is where everything is: "cpu", "cuda:1", or "auto", accelerators if there are any;
        `device_map`, instead, may split the model between layers (`parallel.plan_devices`).
        `pin_threads` gives helper threads a core each. `context_tokens` limits prompt and answer
        together (default: the config's limit); more extends the model by YaRN, up to fourfold where
        it can be. `rope` "per-request" extends a request only
        as far as its prompt and `max_tokens` need, "as-config" as the config says, always.
        `kv_cache_tokens` is the room for all requests, `kv_dtype` "fp32", "bf16" or "int8" what
        keys and values are kept in ("auto": bf16 where products round activations, else as
        computed). `offline` uses no network; `revision` names a branch, tag or commit.

        Raises ModelNotFoundError, NetworkError, CheckpointError, ConfigError, TokenizerError or
        UsageError.
        """
        _check_arguments(model, compute, threads, context_tokens)
        EngineSettings(kv_cache_tokens=kv_cache_tokens, kv_dtype=kv_dtype)  # known before loading
        asked = _asked_places(device, device_map)
        plan, self.rope = WeightPlan(weights, group_size, head_weights), rope_mode(rope)
        self.path = resolve(str(model), offline=offline, revision=revision)
        kernels = cpu.register(threads=threads, pin_threads=pin_threads)
        room = kv_cache_tokens or context_tokens
        self.devices = plan_devices(self.path, asked, dtype=dtype, kv_cache_tokens=room)
        native = kernels.variant is not None and self.devices == "cpu" and compute != "reference"
        loaded = load(
            self.path,
            dtype=dtype,
            device=self.devices if isinstance(self.devices, str) else self.devices.devices,
            plan=plan if native or weights != "auto" else None,  # else run what is stored, as it is
            progress=progress,
        )
        kv, plain = _kv_dtype(kv_dtype, loaded.model, native=native), compute == "reference"
        settings = EngineSettings(kv_cache_tokens=kv_cache_tokens, kv_dtype=kv, reference_ops=plain)
        self._serve(loaded, context_tokens, settings)

    def _serve(self, loaded: Loaded, context_tokens: int | None, settings: EngineSettings) -> None:
        """Keep what was loaded and start its engine."""
        self.model = loaded.model
        self.config = loaded.config
        self.record = loaded.record
        self.tokenizer = loaded.tokenizer
        self.checkpoint = loaded.checkpoint
        self.context_tokens = context_limit(self.record, self.config, context_tokens, self.rope)
        if settings.kv_cache_tokens is None:
            settings = dataclasses.replace(settings, kv_cache_tokens=self.context_tokens)
        self._service = EngineService(self._engine(settings))

    @property
    def device(self) -> torch.device:
        """Where token ids go in: the device of everything, or of a split model's embedding."""
        placed = self.devices
        return torch.device(placed.first if isinstance(placed, DeviceMap) else placed)

    def _engine(self, settings: EngineSettings) -> Engine:
        layer_devices = None
        if isinstance(self.devices, DeviceMap):
            connect(self.model, self.devices)
            layer_devices = self.devices.layer_devices
        return Engine(
            self.model,
            self.tokenizer,
            settings,
            stop_token_ids=self.record.stop_token_ids,
            context_tokens=self.context_tokens,
            trained_tokens=self.record.trained_context_tokens,
            rope=self.rope,
            device=self.device,
            layer_devices=layer_devices,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.record.name!r} at {str(self.path)!r}>"

    def render(
        self,
        messages: Messages,
        *,
        tools: Tools = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> Rendered:
        """Messages to prompt ids. Raises RequestError or TemplateError."""
        return render(
            parse_messages(messages),
            tokenizer=self.tokenizer,
            record=self.record,
            tools=parse_tools(tools),
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
        )

    def sampling(self, given: Sampling = None) -> SamplingParams:
        """The sampling that a request would use: the model's own defaults, changed by `given`.

        A `SamplingParams` is used exactly as it is; a mapping changes single fields. A missing
        seed is drawn here, so that every answer can be repeated. Raises RequestError.
        """
        if isinstance(given, SamplingParams):
            chosen = given
        else:
            chosen = self.record.sampling.replace(**_changes(given))
        return chosen if chosen.seed is not None else chosen.replace(seed=secrets.randbits(31))

    def _request(self, prompt: Prompt, sampling: Sampling) -> Request:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            bos = self.record.bos_token_id
            if self.record.add_bos_token and bos is not None:
                ids.insert(0, bos)
        else:
            ids = _prompt_ids(prompt)
        return Request(secrets.token_hex(8), tuple(ids), self.sampling(sampling))

    def _chat_request(
        self, messages: Messages, sampling: Sampling, tools: Tools, continue_final: bool
    ) -> Request:
        rendered = self.render(messages, tools=tools, continue_final_message=continue_final)
        return self._request(rendered.ids, sampling)


class LLM(_Session):
    """A model to talk to from ordinary code, from several threads too; a context manager."""

    def stream(self, prompt: Prompt, sampling: Sampling = None) -> Iterator[Event]:
        """Events of a raw completion of text or ids: tokens, then exactly one FinishEvent.

        Closing the iterator aborts the request. Raises RequestError before the first event.
        """
        return self._service.stream(self._request(prompt, sampling))

    def stream_chat(
        self,
        messages: Messages,
        sampling: Sampling = None,
        *,
        tools: Tools = (),
        continue_final_message: bool = False,
    ) -> Iterator[Event]:
        """Events of the assistant's next turn; see `stream`."""
        request = self._chat_request(messages, sampling, tools, continue_final_message)
        return self._service.stream(request)

    @overload
    def generate(self, prompts: str, sampling: Sampling = None) -> Completion: ...
    @overload
    def generate(self, prompts: Prompts, sampling: Sampling = None) -> list[Completion]: ...
    def generate(
        self, prompts: str | Prompts, sampling: Sampling = None
    ) -> Completion | list[Completion]:
        """Complete one text, or a list of texts or id lists in one batch (answers in order)."""
        if isinstance(prompts, str):
            return self._complete([self._request(prompts, sampling)])[0]
        several = _several(prompts)
        return self._complete([self._request(prompt, sampling) for prompt in several])

    def chat(
        self,
        messages: Messages,
        sampling: Sampling = None,
        *,
        tools: Tools = (),
        continue_final_message: bool = False,
    ) -> Completion:
        """The assistant's next turn. Raises RequestError or TemplateError."""
        request = self._chat_request(messages, sampling, tools, continue_final_message)
        return self._complete([request])[0]

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


class AsyncLLM(_Session):
    """The same model for asyncio code; several requests run together in one engine."""

    def stream(self, prompt: Prompt, sampling: Sampling = None) -> AsyncIterator[Event]:
        """Events of a raw completion of text or ids; see `LLM.stream`."""
        return self._service.astream(self._request(prompt, sampling))

    def stream_chat(
        self,
        messages: Messages,
        sampling: Sampling = None,
        *,
        tools: Tools = (),
        continue_final_message: bool = False,
    ) -> AsyncIterator[Event]:
        """Events of the assistant's next turn; see `LLM.stream_chat`."""
        request = self._chat_request(messages, sampling, tools, continue_final_message)
        return self._service.astream(request)

    @overload
    async def generate(self, prompts: str, sampling: Sampling = None) -> Completion: ...
    @overload
    async def generate(self, prompts: Prompts, sampling: Sampling = None) -> list[Completion]: ...
    async def generate(
        self, prompts: str | Prompts, sampling: Sampling = None
    ) -> Completion | list[Completion]:
        """Complete one text, or a list of texts or id lists in one batch (answers in order)."""
        if isinstance(prompts, str):
            return await self._complete(self._request(prompts, sampling))
        requests = [self._request(prompt, sampling) for prompt in _several(prompts)]
        return list(await asyncio.gather(*(self._complete(request) for request in requests)))

    async def chat(
        self,
        messages: Messages,
        sampling: Sampling = None,
        *,
        tools: Tools = (),
        continue_final_message: bool = False,
    ) -> Completion:
        """The assistant's next turn; see `LLM.chat`."""
        request = self._chat_request(messages, sampling, tools, continue_final_message)
        return await self._complete(request)

    async def close(self) -> None:
        """Stop the engine; running requests end with the reason "abort"."""
        self._service.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _complete(self, request: Request) -> Completion:
        collector = Collector(request)
        async for event in self._service.astream(request):
            collector.add(event)
        return collector.completion()


def _changes(given: object) -> dict[str, Any]:
    """Changes of single sampling fields. Raises RequestError for what is no mapping of names."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        kind = type(given).__name__
        message = f"expected SamplingParams or a mapping of option names, got {kind} {given!r}."
        raise RequestError("sampling", message)
    return dict(given)


def _several(prompts: object) -> list[Any]:
    """A list of prompts as a list. Raises RequestError for anything else."""
    if isinstance(prompts, bytes | Mapping | Set) or not isinstance(prompts, Iterable):
        kind = type(prompts).__name__
        raise RequestError("prompts", f"expected a text or a list of texts or ids, got {kind}.")
    several = list(prompts)
    if any(isinstance(prompt, numbers.Integral) for prompt in several):
        raise RequestError("prompts", "a list of ids must be inside a list: [[1, 2, 3]].")
    return several


def _prompt_ids(prompt: object) -> list[int]:
    """Ids as plain integers. Raises RequestError for anything else."""
    if isinstance(prompt, torch.Tensor):
        prompt = prompt.tolist()
    if isinstance(prompt, bytes | Mapping | Set) or not isinstance(prompt, Iterable):
        kind = type(prompt).__name__
        raise RequestError("prompt", f"expected a text or a list of ids, got {kind}.")
    ids = list(prompt)
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, numbers.Integral):
            raise RequestError("prompt", f"expected whole numbers as ids, got {token_id!r}.")
    return [int(token_id) for token_id in ids]


def _asked_places(device: str, device_map: GivenMap | None) -> str | dict[str, str]:
    if device_map is not None and device != "cpu":
        raise UsageError(f"device: {device!r} was given beside a device_map; drop one.")
    return read_places(device if device_map is None else device_map)


def _check_arguments(model: object, compute: object, threads: object, context: object) -> None:
    if not isinstance(model, str | Path):
        raise UsageError(f"model: expected a name or a path, got {model!r}.")
    if compute not in COMPUTE:
        raise UsageError(f"compute: got {compute!r}. {suggest(compute, COMPUTE)}")
    if context is not None and (isinstance(context, bool) or not isinstance(context, int)):
        raise UsageError(f"context_tokens: expected a whole number of tokens, got {context!r}.")
    cores = os.cpu_count() or 1
    is_number = isinstance(threads, int) and not isinstance(threads, bool)
    if threads is not None and not (is_number and threads in range(1, cores + 1)):
        raise UsageError(f"threads: got {threads!r}; allowed: 1 to {cores}, the cores here.")


def _kv_dtype(asked: str, model: torch.nn.Module, *, native: bool) -> str:
    """bf16 for "auto" where native products of the model's weights take less than fp32."""
    packed = [m for m in model.modules() if isinstance(m, PackedWeight)]
    rounds = native and any(m.kind != "fp32" for m in packed)
    return "bf16" if asked == "auto" and rounds else asked
