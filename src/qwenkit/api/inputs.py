"""What users hand over, prompts and options, as the plain values that requests are made of."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch

from qwenkit.engine.request import Request
from qwenkit.errors import RequestError
from qwenkit.types.messages import Message, Tool
from qwenkit.types.options import RequestOptions
from qwenkit.types.protocols import Tokenizer
from qwenkit.types.record import ModelRecord
from qwenkit.types.sampling import SamplingParams

Sampling = SamplingParams | Mapping[str, Any] | None
Options = RequestOptions | Mapping[str, Any] | None
Messages = Iterable[Message | Mapping[str, Any]]
Tools = Iterable[Tool | Mapping[str, Any]]
Prompt = str | Sequence[int]
MakeRequest = Callable[[Prompt, Sampling, Options], Request]
Prompts = list[str] | list[list[int]] | list[Prompt] | tuple[Prompt, ...]


def sampling_changes(given: object) -> dict[str, Any]:
    """Changes of single sampling fields. Raises RequestError for what is no mapping of names."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        kind = type(given).__name__
        message = f"expected SamplingParams or a mapping of option names, got {kind} {given!r}."
        raise RequestError("sampling", message)
    return dict(given)


def several_prompts(prompts: object) -> list[Any]:
    """A list of prompts as a list. Raises RequestError for anything else."""
    if isinstance(prompts, bytes | Mapping | Set) or not isinstance(prompts, Iterable):
        kind = type(prompts).__name__
        raise RequestError("prompts", f"expected a text or a list of texts or ids, got {kind}.")
    several = list(prompts)
    if any(isinstance(prompt, numbers.Integral) for prompt in several):
        raise RequestError("prompts", "a list of ids must be inside a list: [[1, 2, 3]].")
    return several


def prompt_ids(prompt: object) -> list[int]:
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


def encoded_prompt(prompt: Prompt, tokenizer: Tokenizer, record: ModelRecord) -> list[int]:
    """A text as its ids, behind the token that begins every text of such a model; ids as they are.

    Raises RequestError for anything else.
    """
    if not isinstance(prompt, str):
        return prompt_ids(prompt)
    ids = tokenizer.encode(prompt)
    if record.add_bos_token and record.bos_token_id is not None:
        ids.insert(0, record.bos_token_id)
    return ids


def request_options(given: object) -> RequestOptions:
    """Options of one request. Raises RequestError for what is no mapping of names."""
    if isinstance(given, RequestOptions):
        return given
    if given is not None and not isinstance(given, Mapping):
        kind = type(given).__name__
        raise RequestError("options", f"expected RequestOptions or a mapping, got {kind}.")
    return RequestOptions.from_mapping(given or {})
