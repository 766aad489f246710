"""Room 4: reads the model record, once per checkpoint, for every room that later asks.

Sampling defaults come with the model (its generation_config.json). Files that carry none, such as
GGUF, get the values their makers published for that family; see `_PUBLISHED_SAMPLING`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from qwenkit.chat.dialects.spec import shown_by
from qwenkit.checkpoint.spec import Checkpoint
from qwenkit.errors import CheckpointError, RequestError, UsageError
from qwenkit.layers.position import allowed_tokens, reachable_tokens, trained_tokens
from qwenkit.models.spec import ModelConfig, find
from qwenkit.types.extension import RopeMode
from qwenkit.types.protocols import Tokenizer
from qwenkit.types.record import ChatFormat, ModelRecord
from qwenkit.types.sampling import SamplingParams

# Control tokens that end a text or a turn in every generation of Qwen and in other ChatML models.
_END_TOKENS = ("<|endoftext|>", "<|im_end|>")

# For checkpoints without sampling defaults of their own. Sources: the generation_config.json of
# Qwen2-7B-Instruct; the model card of SmolLM2-135M-Instruct.
_PUBLISHED_SAMPLING: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
    "smollm2": {"temperature": 0.2, "top_p": 0.9},
}
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_PLAIN = ("F32", "F16", "BF16", "F64")
_DEFAULT_SYSTEM = "You are a helpful assistant."


def read_record(checkpoint: Checkpoint, tokenizer: Tokenizer, config: ModelConfig) -> ModelRecord:
    """What the checkpoint says about its own use.

    Raises CheckpointError when a field of its configuration files cannot be used.
    """
    model_type = str(checkpoint.config["model_type"])
    chat_format = _chat_format(checkpoint)
    eos = _token_ids(checkpoint, "eos_token_id", tokenizer.vocab_size)
    pad = _token_ids(checkpoint, "pad_token_id")
    bos = _token_ids(checkpoint, "bos_token_id")
    ends = [tokenizer.control_tokens[t] for t in _END_TOKENS if t in tokenizer.control_tokens]
    named_eos = _named_token(checkpoint, tokenizer, "eos_token")
    stops = dict.fromkeys([*eos, *([] if named_eos is None else [named_eos]), *ends])
    window = checkpoint.generation_config.get("max_window_size")
    return ModelRecord(
        name=checkpoint.name,
        model_type=model_type,
        chat_format=chat_format,
        context_tokens=allowed_tokens(config.position, config.max_position_embeddings),
        trained_context_tokens=trained_tokens(config.position, config.max_position_embeddings),
        stop_token_ids=tuple(i for i in stops if i < config.vocab_size),
        vocab_size=tokenizer.vocab_size,
        vocab_rows=config.vocab_size,
        eos_token_id=eos[0] if eos else named_eos,
        bos_token_id=bos[0] if bos else None,
        pad_token_id=pad[0] if pad else _named_token(checkpoint, tokenizer, "pad_token"),
        add_bos_token=checkpoint.tokenizer_config.get("add_bos_token") is True,
        chat_template=checkpoint.chat_template,
        default_system=_DEFAULT_SYSTEM if chat_format == "chatml" else None,
        sampling=_sampling(checkpoint),
        history_window_tokens=window if isinstance(window, int) else None,
        dialect=_dialect(chat_format, checkpoint.chat_template, find(model_type).dialect),
        licence=checkpoint.licence,
        quantization=_quantization(checkpoint),
        stored_dtype=_most_bytes(checkpoint, lambda tag: tag in _PLAIN),
    )


def context_limit(
    record: ModelRecord, config: ModelConfig, asked: int | None, rope: RopeMode
) -> int:
    """The context to serve in tokens: what the config allows, or what is `asked` for.

    Raises UsageError when no extension under `rope` reaches that far.
    """
    if asked is None:
        return record.context_tokens
    longest, extended = (
        reachable_tokens(config.position, config.max_position_embeddings, mode)
        for mode in (rope, "per-request")
    )
    if not 1 <= asked <= longest:
        more = f" rope='per-request' reaches {extended}." if extended > longest else ""
        raise UsageError(f"context_tokens: got {asked}; {record.name} allows 1 to {longest}.{more}")
    return asked


def _chat_format(checkpoint: Checkpoint) -> ChatFormat:
    if checkpoint.chat_template is not None:
        return "template"
    named = checkpoint.generation_config.get("chat_format")  # the first generation says it here
    return "chatml" if named == "chatml" else "raw"


def _dialect(chat_format: ChatFormat, template: str | None, usual: str | None) -> str | None:
    """How the model calls tools: as its template shows it, or as its architecture's models do."""
    if chat_format == "raw":
        return None
    if chat_format == "chatml":
        return "react"
    return shown_by(template or "") or usual or "hermes"


def _token_ids(checkpoint: Checkpoint, key: str, tokens: int | None = None) -> list[int]:
    """Every id that the generation config, then the config, gives for `key`; of a tokenizer of so
    many `tokens` where they are given.
    """
    ids: list[int] = []
    for source, values in (
        ("generation_config.json", checkpoint.generation_config),
        ("config.json", checkpoint.config),
    ):
        value = values.get(key)
        where = _where(checkpoint, source)
        for item in value if isinstance(value, list) else [value]:
            if item is None or item == -1:  # -1: "none" in some older files
                continue
            if isinstance(item, bool) or not isinstance(item, int) or item < 0:
                raise CheckpointError(where, key, f"expected a token id, got {item!r}.")
            if tokens is not None and item >= tokens:
                raise CheckpointError(where, key, f"{item} is no token; the last is {tokens - 1}.")
            ids.append(item)
    return list(dict.fromkeys(ids))


def _named_token(checkpoint: Checkpoint, tokenizer: Tokenizer, key: str) -> int | None:
    """The id of a token that tokenizer_config.json gives by its text."""
    value = checkpoint.tokenizer_config.get(key)
    text = value.get("content") if isinstance(value, Mapping) else value
    return tokenizer.control_tokens.get(text) if isinstance(text, str) else None


def given_sampling(
    given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> SamplingParams:
    """What the keys of a generation config say, over `defaults`; `do_sample` is not looked at.

    Raises RequestError naming the key that cannot be used.
    """
    values = dict(defaults or {})
    values |= {name: given[name] for name in _SAMPLING_KEYS if given.get(name) is not None}
    if given.get("max_new_tokens") is not None:
        values["max_tokens"] = given["max_new_tokens"]
    try:
        return SamplingParams.from_mapping(values)
    except RequestError as error:
        if error.field != "max_tokens":
            raise
        reason = str(error).removeprefix("max_tokens: ")
        raise RequestError("max_new_tokens", reason) from error


def _sampling(checkpoint: Checkpoint) -> SamplingParams:
    """The penalty of repetition and the limit of new tokens count in greedy decoding too."""
    given, defaults = checkpoint.generation_config, {}
    if not {"do_sample", "temperature", "top_p", "top_k"} & set(given):
        family = _family(checkpoint) if checkpoint.chat_template else None
        defaults = dict(_PUBLISHED_SAMPLING[family] if family else {"temperature": 0.0})
    do_sample = given.get("do_sample")
    try:
        if do_sample is not None and not isinstance(do_sample, bool):
            raise RequestError("do_sample", f"expected true or false, got {do_sample!r}.")
        if do_sample is False:
            given = {key: given.get(key) for key in ("repetition_penalty", "max_new_tokens")}
            defaults = {"temperature": 0.0}
        return given_sampling(given, defaults)
    except RequestError as error:
        where = _where(checkpoint, "generation_config.json")
        reason = str(error).removeprefix(f"{error.field}: ")
        raise CheckpointError(where, error.field, reason) from error


def _where(checkpoint: Checkpoint, source: str) -> str:
    """The file of a key, as the user knows it."""
    return str(checkpoint.path) if checkpoint.folder is None else f"{checkpoint.path} ({source})"


def _family(checkpoint: Checkpoint) -> str | None:
    names = (checkpoint.gguf_metadata.get("general.basename"), checkpoint.config.get("model_type"))
    return next((str(n).lower() for n in names if str(n).lower() in _PUBLISHED_SAMPLING), None)


def _quantization(checkpoint: Checkpoint) -> str | None:
    block = checkpoint.config.get("quantization_config")
    if isinstance(block, Mapping):
        return str(block.get("quant_method", "unknown"))
    return _most_bytes(checkpoint, lambda tag: "_" in tag and not tag.startswith("F8"))


def _most_bytes(checkpoint: Checkpoint, wanted: Any) -> str | None:
    """The storage tag, among the wanted ones, that holds most of the checkpoint's bytes."""
    tensors: Iterable[Any] = checkpoint.tensors.values()
    bytes_by_tag: Counter[str] = Counter()
    for tensor in tensors:
        if wanted(tensor.storage):
            bytes_by_tag[tensor.storage] += tensor.size_bytes
    return bytes_by_tag.most_common(1)[0][0] if bytes_by_tag else None
