"""What `LLM` and `AsyncLLM` share: one loaded model, its engine and its chat renderer."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwenkit.adapter_files import read_adapter
from qwenkit.adapters.lora import Merging
from qwenkit.api.draft import make_drafter
from qwenkit.api.inputs import (
    Messages,
    Options,
    Prompt,
    Sampling,
    Tools,
    encoded_prompt,
    request_options,
    sampling_changes,
)
from qwenkit.api.replies import GivenToolOptions, PreparedReply, read_tool_options, reply_sampling
from qwenkit.chat.render import Rendered, render
from qwenkit.checkpoint.hub import resolve
from qwenkit.engine.draft_model import DraftModel
from qwenkit.engine.engine import Engine
from qwenkit.engine.plan import SchedulerStatus
from qwenkit.engine.request import Request
from qwenkit.engine.service import EngineService
from qwenkit.engine.settings import EngineSettings
from qwenkit.errors import UsageError, suggest
from qwenkit.formats.packed import PackedWeight
from qwenkit.formats.plan import WeightPlan
from qwenkit.kernels import cpu
from qwenkit.kernels.packed import KINDS
from qwenkit.load import Loaded, load
from qwenkit.parallel import DeviceMap, GivenMap, connect, plan_devices, read_places
from qwenkit.record import context_limit
from qwenkit.types.extension import rope_mode
from qwenkit.types.messages import parse_messages, parse_tools
from qwenkit.types.sampling import SamplingParams

COMPUTE = ("auto", "reference")


class Session:
    """One loaded model and one engine; `LLM` and `AsyncLLM` say how to wait for answers."""

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
        prefix_cache: bool = True,
        speculation: str = "none",
        draft: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        merge: str | Path | None = None,
        offline: bool = False,
        revision: str | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Load `model`: "default", a name on a hub, a folder or a .gguf file.

        `dtype` "auto", "float32" or "bfloat16" is that of the activations. `weights` "auto" runs
        what is stored; "int4", "int8", "bf16" or "fp32" rounds every matrix to nearest at load,
        with `group_size` columns to a scale (32, 64 or 128) and `head_weights` for embedding and
        head (default: int8 with int4); "nf4", "fp4", "nf4-double", "fp4-double" and "llm-int8" are
        bitsandbytes'. `compute` "auto" uses the fastest kernels of this machine, which round
        activations where weights are whole numbers, "reference" the readable torch ones.
        `device` is where everything is: "cpu", "cuda:1", or "auto", accelerators if there are any;
        `device_map`, instead, may split the model between layers (`parallel.plan_devices`).
        `pin_threads` gives helper threads a core each. `context_tokens` limits prompt and answer
        together (default: the config's limit); more extends the model by YaRN, up to fourfold.
        `rope` "per-request" extends a request only as far as its prompt and `max_tokens` need,
        "as-config" as the config says, always. `kv_cache_tokens` is the room for all requests,
        `kv_dtype` "fp32", "bf16", "int8" or "int4" what keys and values are kept in ("auto": bf16
        where products round activations, else as computed). `prefix_cache` keeps what prompts begin
        with. `speculation` "prompt-lookup" guesses tokens from what was said before, `draft` names
        a smaller model of the same vocabulary that guesses them: the output stays the same.
        `adapters` are served by name beside the model (see `load_adapter`), `merge` is one to go
        into its weights: into quantized ones only where `weights` says what they become. `offline`
        uses no network; `revision` is a branch or tag.

        Raises UsageError, and as `resolve`, `load` and `qwenkit.adapter_files.read_adapter`.
        """
        _check_arguments(model, compute, threads, context_tokens, adapters)
        settings = EngineSettings(  # what is wrong there is known before anything is loaded
            kv_cache_tokens=kv_cache_tokens,
            kv_dtype=kv_dtype,
            prefix_cache=prefix_cache,
            speculation=speculation,
            reference_ops=compute == "reference",
        )
        if draft is not None and speculation != "none":
            raise UsageError(f"draft: {draft} was given beside {speculation!r}; drop one.")
        asked = _asked_places(device, device_map)
        plan, self.rope = WeightPlan(weights, group_size, head_weights), rope_mode(rope)
        self.weights = plan
        self.path = resolve(str(model), offline=offline, revision=revision)
        kernels = cpu.register(threads=threads, pin_threads=pin_threads)
        room = kv_cache_tokens or context_tokens
        self.devices = plan_devices(self.path, asked, dtype=dtype, kv_cache_tokens=room)
        native = kernels.variant is not None and self.devices == "cpu" and compute != "reference"
        used = plan if native or weights != "auto" else None  # else run what is stored, as it is
        merging = _merging(merge, offline=offline, dequantize=weights != "auto")
        loaded = self._read(self.path, dtype, used, merging, progress)
        drafting = self._read_draft(draft, dtype, used, offline=offline)
        kv = _kv_dtype(kv_dtype, loaded.model, native=native)
        self._serve(loaded, context_tokens, replace(settings, kv_dtype=kv), drafting)
        try:
            for adapter_name, adapter in (adapters or {}).items():
                self._load_adapter(adapter_name, adapter, offline=offline)
        except BaseException:
            self._service.close()
            raise

    def _read(
        self,
        path: Path,
        dtype: str,
        plan: WeightPlan | None,
        merging: Merging | None,
        progress: Callable[[float], None] | None,
    ) -> Loaded:
        place = self.devices if isinstance(self.devices, str) else self.devices.devices
        return load(path, dtype=dtype, device=place, plan=plan, merging=merging, progress=progress)

    def _read_draft(
        self,
        draft: str | Path | None,
        dtype: str,
        plan: WeightPlan | None,
        *,
        offline: bool,
    ) -> Loaded | None:
        if draft is None:
            return None
        if not isinstance(self.devices, str):
            raise UsageError("draft: a draft model does not work with a model on several devices.")
        return self._read(resolve(str(draft), offline=offline), dtype, plan, None, None)

    def _serve(
        self,
        loaded: Loaded,
        context_tokens: int | None,
        settings: EngineSettings,
        drafting: Loaded | None,
    ) -> None:
        """Keep what was loaded and start its engine."""
        self.model = loaded.model
        self.config = loaded.config
        self.record = loaded.record
        self.tokenizer = loaded.tokenizer
        self.checkpoint = loaded.checkpoint
        self.context_tokens = context_limit(self.record, self.config, context_tokens, self.rope)
        if settings.kv_cache_tokens is None:
            settings = replace(settings, kv_cache_tokens=self.context_tokens)
        self.default_adapter: str | None = None  # of requests that name none
        self.engine_settings = settings
        drafter = None
        if drafting is not None:
            drafter = make_drafter(drafting, loaded, settings, self.device)
        engine = self._engine(settings, drafter)
        self._limits = engine.limits
        self._service = EngineService(engine)

    @property
    def device(self) -> torch.device:
        """Where token ids go in: the device of everything, or of a split model's embedding."""
        placed = self.devices
        return torch.device(placed.first if isinstance(placed, DeviceMap) else placed)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""
        return self._service.engine.adapters

    def status(self) -> SchedulerStatus:
        """How busy the engine is, and its counts until now. Any thread may ask."""
        return self._service.engine.status()

    def _load_adapter(
        self, name: str, adapter: str | Path, *, revision: str | None = None, offline: bool = False
    ) -> None:
        read = read_adapter(resolve(str(adapter), offline=offline, revision=revision))
        prepared = self._service.engine.prepare_adapter(read)
        self._service.call(lambda engine: engine.load_adapter(name, prepared))

    def _unload_adapter(self, name: str) -> None:
        self._service.call(lambda engine: engine.unload_adapter(name))

    def _engine(self, settings: EngineSettings, drafter: DraftModel | None) -> Engine:
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
            drafter=drafter,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.record.name!r} at {str(self.path)!r}>"

    def render(
        self,
        messages: Messages,
        *,
        tools: Tools = (),
        tool_options: GivenToolOptions = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Messages to prompt ids. Raises RequestError or TemplateError."""
        return render(
            parse_messages(messages),
            tokenizer=self.tokenizer,
            record=self.record,
            tools=parse_tools(tools),
            tool_options=read_tool_options(tool_options),
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )

    def sampling(self, given: Sampling = None) -> SamplingParams:
        """The sampling that a request would use: the model's own defaults, changed by `given`.

        A `SamplingParams` is used exactly as it is; a mapping changes single fields. A missing
        seed is drawn here, so that every answer can be repeated. Raises RequestError.
        """
        chosen = self.record.sampling if given is None else given
        if not isinstance(chosen, SamplingParams):
            chosen = self.record.sampling.replace(**sampling_changes(chosen))
        return chosen if chosen.seed is not None else chosen.replace(seed=secrets.randbits(31))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Ids as they are; a text encoded, with the model's first token if it wants one."""
        return encoded_prompt(prompt, self.tokenizer, self.record)

    def _request(
        self, prompt: Prompt, sampling: Sampling = None, options: Options = None
    ) -> Request:
        ids = self.prompt_ids(prompt)
        name, chosen = secrets.token_hex(8), self.sampling(sampling)
        asked = request_options(options)
        if asked.adapter is None and self.default_adapter is not None:
            asked = replace(asked, adapter=self.default_adapter)
        return Request(name, tuple(ids), chosen, asked)

    def prepare_reply(
        self,
        messages: Messages,
        sampling: Sampling = None,
        *,
        tools: Tools = (),
        tool_options: GivenToolOptions = None,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        options: Options = None,
    ) -> PreparedReply:
        """The request for the assistant's next turn, and how to read what comes. Nothing is asked
        of the engine. Raises RequestError or TemplateError.
        """
        rendered = self.render(
            messages,
            tools=tools,
            tool_options=tool_options,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        chosen = reply_sampling(self.sampling(sampling), rendered.reply)
        return PreparedReply(self._request(rendered.ids, chosen, options), rendered)


def _merging(adapter: str | Path | None, *, offline: bool, dequantize: bool) -> Merging | None:
    if adapter is None:
        return None
    return Merging(read_adapter(resolve(str(adapter), offline=offline)), dequantize=dequantize)


def _asked_places(device: str, device_map: GivenMap | None) -> str | dict[str, str]:
    if device_map is not None and device != "cpu":
        raise UsageError(f"device: {device!r} was given beside a device_map; drop one.")
    return read_places(device if device_map is None else device_map)


def _check_arguments(
    model: object, compute: object, threads: object, context: object, adapters: object
) -> None:
    if adapters is not None and not isinstance(adapters, Mapping):
        raise UsageError(f"adapters: expected a mapping of names to paths, got {adapters!r}.")
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
    rounds = native and any(KINDS[m.kind].form not in ("fp32", "fp8") for m in packed)
    return "bf16" if asked == "auto" and rounds else asked
