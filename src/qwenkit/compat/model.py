"""`AutoModelForCausalLM` and the model object of the published snippets."""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from qwenkit.api import LLM
from qwenkit.chat.render import render
from qwenkit.checkpoint import open_checkpoint
from qwenkit.checkpoint.hub import resolve
from qwenkit.compat.generation import GenerationConfig
from qwenkit.compat.prompts import History, conversation
from qwenkit.compat.quantization import BitsAndBytesConfig, read_config
from qwenkit.compat.streamers import TextStreamer
from qwenkit.compat.tokenizer import CompatTokenizer
from qwenkit.errors import QwenkitError, UsageError
from qwenkit.formats.config import read_quantization
from qwenkit.kernels import devices
from qwenkit.layers.attention import ByDevice, PackedCausal
from qwenkit.parallel import GivenMap, plan_evenly, read_places
from qwenkit.types.events import FinishEvent, FinishReason, PromptEvent, TokenEvent

DEFAULT_SYSTEM = "You are a helpful assistant."
_NO_HALF = (
    "dtype: float16 was asked for, but Qwen's activations go beyond it and a processor is slow in "
    "it; bfloat16 or float32 is computed instead, whichever suits the processor."
)
_log = logging.getLogger(__name__)
_STREAM_REFUSED = (
    "stream: call chat_stream(…) for streaming. / 流式对话请改用 chat_stream(…)，"
    "chat(…) 不再支持 stream 参数。"
)


@dataclass(frozen=True, slots=True)
class CausalOutput:
    """What calling the model gives: `logits` [batch, length, vocab_size]."""

    logits: torch.Tensor


class CompatModel:
    """A loaded model with the calls of the published snippets."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.generation_config = GenerationConfig.from_record(llm.record)

    @property
    def device(self) -> torch.device:
        """Where token ids go in; of a model on several devices that of the embedding."""
        return self.llm.device

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in."""
        return self.llm.model.dtype

    @property
    def config(self) -> Any:
        """The architecture's configuration."""
        return self.llm.config

    def eval(self) -> Self:
        """Nothing to do: a loaded model is always in evaluation mode."""
        return self

    def to(self, device: torch.device | str) -> Self:
        """The model itself, if it is there already; choose a device when loading it.

        Raises UsageError for another device.
        """
        if torch.device(device).type != self.device.type:
            raise UsageError(
                f"to: the model is on {self.device}; load it with device_map={device!r}."
            )
        return self

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The plain parameters; weights in a quantized format are not among them."""
        return self.llm.model.parameters()

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> CausalOutput:
        """Logits of whole sequences, [batch, length, vocab_size].

        input_ids and attention_mask are [batch, length]; padding may stand on either side, and the
        logits at padded places are zeros. Positions count real tokens only.
        """
        return self._logits(self.llm.model, input_ids, attention_mask)

    def _logits(
        self, model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> CausalOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if input_ids.dim() != 2 or mask.shape != input_ids.shape:
            raise UsageError(
                f"input_ids: expected [batch, length] with a mask of the same shape, got "
                f"{tuple(input_ids.shape)} and {tuple(mask.shape)}."
            )
        real = mask.bool()
        lengths = [n for n in real.sum(1).tolist() if n]
        context = ByDevice(lambda device: PackedCausal(lengths, device=device))
        flat: torch.Tensor = model(input_ids[real].to(self.device), context)
        logits = flat.new_zeros(*input_ids.shape, flat.shape[-1])  # [batch, length, vocab]
        logits[real.to(flat.device)] = flat
        return CausalOutput(logits)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: TextStreamer | None = None,
        return_dict_in_generate: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        """Prompts and their continuations, [batch, longest]; short rows are padded on the right.

        `options` change single fields of the generation config for this call (max_new_tokens,
        do_sample, top_p, stop_words_ids …); an unknown one is an error naming the nearest.
        A sequence in `stop_words_ids` ends the output right after it. A row of several prompts is
        generated exactly as it would be alone. Raises RequestError or UsageError.
        """
        if return_dict_in_generate:
            raise UsageError("return_dict_in_generate: only False is supported.")
        ids = inputs if inputs is not None else input_ids
        if not isinstance(ids, torch.Tensor):
            kind = type(ids).__name__
            raise UsageError(f"input_ids: expected a tensor [batch, length], got {kind}.")
        config = (generation_config or self.generation_config).updated(options)
        rows = self._unpadded(ids, attention_mask, config)
        if streamer is not None:
            return self._generate_streaming(ids, rows, config, streamer)
        completions = self.llm.generate(rows, self._sampling(config))
        for completion in completions:
            _raise_if_failed(completion.finish_reason, completion.error)
        return self._join(ids, [c.token_ids for c in completions], config)

    def _unpadded(
        self, ids: torch.Tensor, mask: torch.Tensor | None, config: GenerationConfig
    ) -> list[list[int]]:
        if ids.dim() != 2:
            raise UsageError(f"input_ids: expected [batch, length], got {tuple(ids.shape)}.")
        if mask is not None:
            return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
        pad = config.pad_token_id
        rows = []
        for row in ids.tolist():
            start = 0
            while len(ids) > 1 and start < len(row) - 1 and row[start] == pad:
                start += 1  # left padding, where no mask says so
            rows.append(row[start:])
        return rows

    def _sampling(self, config: GenerationConfig) -> Any:
        sampling = config.sampling()
        return (
            sampling if sampling.seed is not None else sampling.replace(seed=secrets.randbits(31))
        )

    def _join(
        self, ids: torch.Tensor, outputs: Sequence[Sequence[int]], config: GenerationConfig
    ) -> torch.Tensor:
        longest = max(len(o) for o in outputs)
        pad = config.pad_token_id if config.pad_token_id is not None else 0
        tail = ids.new_full((len(outputs), longest), pad)  # [batch, longest]
        for row, output in zip(tail, outputs, strict=True):
            row[: len(output)] = torch.tensor(output, dtype=ids.dtype)
        return torch.cat((ids, tail), dim=1)

    def _generate_streaming(
        self,
        ids: torch.Tensor,
        rows: list[list[int]],
        config: GenerationConfig,
        streamer: TextStreamer,
    ) -> torch.Tensor:
        if len(rows) != 1:
            raise UsageError(f"streamer: streams one prompt at a time, got {len(rows)}.")
        streamer.put_prompt(rows[0])
        output: list[int] = []
        try:
            for event in self.llm.stream(rows[0], self._sampling(config)):
                if isinstance(event, FinishEvent):
                    _raise_if_failed(event.reason, event.error)
                elif isinstance(event, TokenEvent):
                    output.append(event.token_id)
                    streamer.put(event.token_id)
        finally:
            streamer.end()
        return self._join(ids, [output], config)

    def chat(
        self,
        tokenizer: CompatTokenizer,
        query: str,
        history: History | None,
        system: str = DEFAULT_SYSTEM,
        *,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        stream: bool | None = None,
        **options: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """One turn: (reply, history with this turn added). The given history is not changed."""
        if stream is not None:
            raise UsageError(_STREAM_REFUSED)
        growing = self.chat_stream(
            tokenizer,
            query,
            history,
            system,
            stop_words_ids=stop_words_ids,
            generation_config=generation_config,
            **options,
        )
        *_, text = "", *growing
        return text, [*(history or []), (query, text)]

    def chat_stream(
        self,
        tokenizer: CompatTokenizer,
        query: str,
        history: History | None,
        system: str = DEFAULT_SYSTEM,
        *,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """One turn as growing texts, each the whole reply so far. The history is not changed."""
        config = (generation_config or self.generation_config).updated(options)
        if stop_words_ids:
            config = config.updated(
                {"stop_words_ids": [*(config.stop_words_ids or []), *stop_words_ids]}
            )
        messages = conversation(query, history, system)
        record = self.llm.record
        if config.max_window_size is not None:
            record = dataclasses.replace(record, history_window_tokens=config.max_window_size)
        rendered = render(tuple(messages), tokenizer=tokenizer.core, record=record)
        text = ""
        for event in self.llm.stream(rendered.ids, self._sampling(config)):
            if isinstance(event, FinishEvent):
                _raise_if_failed(event.reason, event.error)
            if not isinstance(event, PromptEvent) and event.text:
                text += event.text
                yield text


def _raise_if_failed(reason: FinishReason, error: str | None) -> None:
    if reason == "error":
        raise QwenkitError(error or "the engine ended this request.")


class AutoModelForCausalLM:
    """Loads a model by its name or folder."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        *,
        device_map: GivenMap | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        bf16: bool = False,
        fp16: bool = False,
        fp32: bool = False,
        trust_remote_code: bool | None = None,
        revision: str | None = None,
        pad_token_id: int | None = None,
        low_cpu_mem_usage: bool | None = None,
        use_safetensors: bool | None = None,
        attn_implementation: str | None = None,
        use_cache_quantization: bool | None = None,
        use_cache_kernel: bool | None = None,
        use_flash_attn: bool | str | None = None,
        quantization_config: Any = None,
        load_in_8bit: bool | None = None,
        load_in_4bit: bool | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
    ) -> CompatModel:
        """Load a model with its published switches.

        `device_map` is "auto", a device, or a mapping of module paths to devices (None: "cpu"); see
        `qwenkit.parallel.plan_devices`. One of `torch_dtype`/`dtype`, `bf16`, `fp16`, `fp32` may
        choose the precision; float16 on a processor becomes what suits it, and that is said, since
        Qwen's activations go beyond it. Remote code is never run; weights are always memory-mapped;
        the switches `low_cpu_mem_usage`, `use_safetensors`, `attn_implementation`,
        `use_cache_kernel`, `use_flash_attn` and `max_memory` are accepted without effect.
        `quantization_config`, a `BitsAndBytesConfig`, rounds weights while they are loaded; a model
        that is quantized already stays as it is, and that is said.
        `use_cache_quantization` keeps keys and values in int8, as it does where the config of a
        first-generation model says so (None); False keeps them as computed. Raises UsageError for
        a contradiction.
        """
        chosen = _dtype(torch_dtype if torch_dtype is not None else dtype, bf16, fp16, fp32)
        places = read_places("cpu" if device_map is None else device_map)
        asked = read_config(quantization_config, load_in_8bit, load_in_4bit)
        if asked is not None and asked.compute_dtype and chosen == "auto":
            chosen = "auto" if _on_a_processor(places) else asked.compute_dtype
        if chosen == "float16" and _on_a_processor(places):
            _log.warning("%s", _NO_HALF)
            chosen = "auto"
        llm = LLM(
            pretrained_model_name_or_path,
            dtype=chosen,
            weights=_weights(asked, pretrained_model_name_or_path, revision),
            device_map=places,
            kv_dtype=_kv_dtype(use_cache_quantization, pretrained_model_name_or_path, revision),
            revision=revision,
        )
        model = CompatModel(llm)
        if pad_token_id is not None:
            model.generation_config.pad_token_id = pad_token_id
        return model


def _dtype(given: torch.dtype | str | None, bf16: bool, fp16: bool, fp32: bool) -> str:
    for switch, value in (("bf16", bf16), ("fp16", fp16), ("fp32", fp32)):
        if not isinstance(value, bool):
            raise UsageError(f"{switch}: expected True or False, got {value!r}.")
    flags = {"bfloat16": bf16, "float16": fp16, "float32": fp32}
    names = [name for name, on in flags.items() if on]
    if given is not None:
        names.append(str(given).removeprefix("torch."))
    if len(set(names)) > 1:
        raise UsageError(f"dtype: choose one precision; got {', '.join(sorted(set(names)))}.")
    return names[0] if names else "auto"


def _weights(asked: BitsAndBytesConfig | None, model: str | Path, revision: str | None) -> str:
    """What weights become: what a config asks for, or, of a model that is quantized, nothing."""
    if asked is None:
        return "auto"
    stored = open_checkpoint(resolve(str(model), revision=revision)).config
    if stored.get("quantization_config") is None:
        return asked.weights
    method = read_quantization(stored)["quant_method"]
    _log.warning("quantization_config: %s is %s already and stays so.", model, method)
    return "auto"


def _kv_dtype(quantized: bool | None, model: str | Path, revision: str | None) -> str:
    """What keys and values are kept in: int8 where that is asked for, or where nothing is and the
    model's config does.
    """
    if quantized is None and isinstance(model, str | Path):
        config = open_checkpoint(resolve(str(model), revision=revision)).config
        quantized = config.get("use_cache_quantization")
    if quantized is not None and not isinstance(quantized, bool):
        raise UsageError(f"use_cache_quantization: expected True or False, got {quantized!r}.")
    return "int8" if quantized else "auto"


def _on_a_processor(places: str | Mapping[str, str]) -> bool:
    """Whether float16 would be computed on a processor."""
    if places == "auto":
        return not devices.find_accelerators()
    return "cpu" in ([places] if isinstance(places, str) else places.values())


def load_model_on_gpus(model_name_or_path: str | Path, num_gpus: int = 2) -> CompatModel:
    """A model with its layers shared out over the first `num_gpus` accelerators; 1 is "auto".

    As the first Qwen's script of this name; see `qwenkit.parallel.device_map.split_evenly`. Raises
    UsageError when there are not so many.
    """
    if num_gpus == 1:
        return AutoModelForCausalLM.from_pretrained(model_name_or_path, device_map="auto")
    path = resolve(str(model_name_or_path))
    placed = plan_evenly(path, num_gpus)
    _log.info("%s", placed)
    return AutoModelForCausalLM.from_pretrained(path, device_map=placed.devices)
