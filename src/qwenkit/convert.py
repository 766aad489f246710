"""Rewrites a model of Qwen's first generation in Qwen2's layout, and back where that can be; and
any model with a larger vocabulary.

Between the layouts weights are split, joined and renamed, never computed; a folder of any size
takes the memory of its largest tensor. What the other architecture cannot do is refused, not
dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qwenkit.checkpoint import open_checkpoint
from qwenkit.checkpoint.layout import joined, parted
from qwenkit.checkpoint.safetensors_write import DEFAULT_SHARD_BYTES
from qwenkit.checkpoint.spec import Checkpoint, StoredTensor
from qwenkit.checkpoint.storages import PLAIN
from qwenkit.errors import TokenizerError, UsageError, suggest
from qwenkit.layers.position import QwenNtk
from qwenkit.load import load, load_tokenizer, read_architecture
from qwenkit.models import qwen, qwen2
from qwenkit.models.rows import fill_rows
from qwenkit.padding import Padded, pad_for_tensor_parallel
from qwenkit.record import read_record
from qwenkit.save import (
    CHATML_TEMPLATE,
    TOKENIZER_FILES,
    Planned,
    copy_files,
    save_folder,
    write_json,
    write_model_folder,
    write_tokenizer,
)
from qwenkit.tokenizer import BytePairTokenizer
from qwenkit.tokenizer.export import write_folder, write_tiktoken
from qwenkit.tokenizer.extend import extended
from qwenkit.tokenizer.files import from_tiktoken
from qwenkit.tokenizer.ranks import write_ranks

# The published vocabularies are padded to 151,936 and 152,064 rows: multiples of 128.
_ROW_MULTIPLE = 128
_EXTRA_FILE = "qwen_extra.tiktoken"
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "license")


def convert_folder(
    source: Path, folder: Path, model_type: str, *, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> list[Path]:
    """Write the model in `source` into `folder` as a `model_type` "qwen2" or "qwen".

    Returns the files of its weights. From "qwen" to "qwen2", dynamic NTK and LogN are left behind,
    which only count beyond the trained length, so that becomes the longest allowed. Raises
    UsageError naming what the other architecture has no place for, and as `open_checkpoint` does.
    """
    checkpoint = open_checkpoint(source)
    directions = {"qwen": "qwen2", "qwen2": "qwen"}
    given = str(checkpoint.config.get("model_type"))
    if given == model_type:
        raise UsageError(f"model_type: {source} is a {model_type!r} already; use it as it is.")
    if directions.get(given) != model_type:
        allowed = suggest(model_type, directions)
        raise UsageError(f"model_type: {given!r} cannot become {model_type!r}. {allowed}")
    if checkpoint.container == "gguf" or checkpoint.config.get("quantization_config"):
        raise UsageError(f"{source}: only a folder with plain weights can be converted.")
    tokenizer = load_tokenizer(checkpoint)
    _, config = read_architecture(checkpoint)
    files: Callable[[Path], None]
    if isinstance(config, qwen.Config):
        converted = _as_qwen2(config)
        chats = read_record(checkpoint, tokenizer, config).chat_format == "chatml"
        template = CHATML_TEMPLATE if chats else checkpoint.chat_template
        files = partial(write_tokenizer, tokenizer, source=checkpoint, chat_template=template)
    else:
        assert isinstance(config, qwen2.Config)
        converted = _as_qwen(config)
        files = partial(_write_first_tokenizer, tokenizer, checkpoint)
    plain = {n: t for n, t in checkpoint.tensors.items() if not n.endswith(qwen.IGNORED)}
    tensors = joined(plain, qwen.QWEN2_NAMES)
    if model_type == "qwen2":
        tensors = parted(tensors, qwen.QWEN2_NAMES)
    kept = {key: checkpoint.config[key] for key in _KEPT if key in checkpoint.config}
    planned = {n: Planned(t.shape, PLAIN[t.storage], t.read) for n, t in tensors.items()}
    return write_model_folder(
        folder,
        checkpoint,
        converted | kept,
        planned,
        tokenizer_files=files,
        shard_bytes=shard_bytes,
    )


@dataclass(frozen=True, slots=True)
class ExportedFolder:
    """The files of the weights that were written and, where it was padded, how."""

    weights: list[Path]
    padded: Padded | None = None


def export_folder(
    source: str | Path,
    folder: Path,
    *,
    pad_for_tp: int = 1,
    group_size: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[float], None] | None = None,
) -> ExportedFolder:
    """Write the model at `source` as a folder of safetensors that transformers and vLLM read.

    With `pad_for_tp` its widths are padded for so many devices, by `pad_for_tensor_parallel`. Of a
    GGUF, blocks become numbers. Weights of a folder pass as they are, one at a time; `progress` is
    told the share done. Raises as `load`, `pad_for_tensor_parallel` and `save_folder` do.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.folder is None:
        if pad_for_tp != 1:
            raise UsageError("pad_for_tp: a GGUF is not padded; export it as a folder first.")
        loaded = load(source, progress=progress)
        return ExportedFolder(save_folder(loaded, folder, shard_bytes=shard_bytes))
    load_tokenizer(checkpoint)  # a folder that lacks one is refused before anything is written
    read_architecture(checkpoint)
    padded = None
    if pad_for_tp != 1:
        padded = pad_for_tensor_parallel(checkpoint, pad_for_tp, group_size=group_size)
    written = checkpoint if padded is None else padded.checkpoint
    tensors = written.tensors
    extra = checkpoint.tokenizer_config.get("extra_vocab_file")
    names = [*TOKENIZER_FILES, *([extra] if extra else [])]
    told = _Told(sum(tensor.size_bytes for tensor in tensors.values()), progress)
    weights = write_model_folder(
        folder,
        checkpoint,
        written.config,
        {
            name: Planned(tensor.shape, PLAIN[tensor.storage], partial(told.read, tensor))
            for name, tensor in tensors.items()
        },
        tokenizer_files=partial(copy_files, checkpoint.folder, names=names),
        shard_bytes=shard_bytes,
    )
    return ExportedFolder(weights, padded)


class _Told:
    """Reads tensors and tells what share of all bytes was read; lets their files' memory go."""

    def __init__(self, size_bytes: int, progress: Callable[[float], None] | None) -> None:
        self._size, self._read, self._progress = max(size_bytes, 1), 0, progress

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        if tensor.release is not None:
            tensor.release()
        self._read += tensor.size_bytes
        if self._progress is not None:
            self._progress(self._read / self._size)
        return tensor.read()


@dataclass(frozen=True, slots=True)
class Extended:
    """A model's tokenizer with its new tokens, and the rows of its embedding before and after."""

    tokenizer: BytePairTokenizer
    rows_before: int
    rows: int


def extend_folder(
    source: Path,
    folder: Path,
    extra: Mapping[bytes, int],
    *,
    progress: Callable[[float], None] | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Extended:
    """Write the model in `source` (a folder or a GGUF) into `folder` with the tokens of `extra`.

    Each new token's row is the mean of the rows of the tokens that its text was until now, in the
    embedding and in a head of its own. Padding rows are used first; further ones are added in
    multiples of 128. `progress` is told the share loaded, 0 to 1. Raises as `load`, `extended` and
    `save_folder` do.
    """
    loaded = load(source, progress=progress)
    old, before = loaded.tokenizer, loaded.config.vocab_size
    tokenizer = BytePairTokenizer(extended(old.vocabulary, extra, source=str(source)))
    new = tokenizer.reference.regular.items() - old.reference.regular.items()
    rows = before
    if tokenizer.vocab_size > before:
        rows = -(-tokenizer.vocab_size // _ROW_MULTIPLE) * _ROW_MULTIPLE
    fill_rows(loaded.model, rows, {i: old.reference.merge(token) for token, i in new})
    checkpoint = replace(loaded.checkpoint, config={**loaded.checkpoint.config, "vocab_size": rows})
    save_folder(
        replace(loaded, checkpoint=checkpoint),
        folder,
        tokenizer_files=partial(_write_extended, tokenizer, checkpoint),
        shard_bytes=shard_bytes,
    )
    return Extended(tokenizer, before, rows)


def _write_extended(tokenizer: BytePairTokenizer, source: Checkpoint, folder: Path) -> None:
    """In the formats that the model has: qwen.tiktoken stays and gets an `extra_vocab_file`."""
    if source.folder is None:
        write_tokenizer(tokenizer, folder, source, source.chat_template)
        return
    copy_files(source.folder, folder, TOKENIZER_FILES)
    if tokenizer.vocabulary.merges is not None:
        write_folder(tokenizer, folder)
        return
    control = min(tokenizer.control_tokens.values())
    regular = tokenizer.reference.regular.items()
    write_ranks(folder / _EXTRA_FILE, {token: rank for token, rank in regular if rank > control})
    config = {**source.tokenizer_config, "extra_vocab_file": _EXTRA_FILE}
    write_json(folder / "tokenizer_config.json", config)


def _as_qwen2(config: qwen.Config) -> dict[str, Any]:
    if not config.no_bias:
        raise UsageError("no_bias: Qwen2 has biases on queries, keys and values only.")
    scaling, longest = config.position.scaling, config.max_position_embeddings
    if isinstance(scaling, QwenNtk):
        longest = min(longest, scaling.trained_tokens)
    if config.position.log_n is not None:
        longest = min(longest, config.position.log_n)
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size // 2,
        "max_position_embeddings": longest,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.layer_norm_epsilon,
        "rope_theta": config.position.base,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def _as_qwen(config: qwen2.Config) -> dict[str, Any]:
    if config.num_key_value_heads != config.num_attention_heads:
        raise UsageError(
            f"num_key_value_heads: {config.num_key_value_heads} for {config.num_attention_heads} "
            "heads; in the first generation every head has its own keys and values."
        )
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise UsageError("head_dim: in the first generation all heads make up hidden_size.")
    if any(config.windows):
        raise UsageError("use_sliding_window: the first generation has no windows.")
    scaling = getattr(config.position, "scaling", "dual chunk attention")
    if scaling is not None:
        raise UsageError("rope_scaling: the first generation has dynamic NTK and LogN only.")
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "hidden_size": config.hidden_size,
        "intermediate_size": 2 * config.intermediate_size,
        "kv_channels": config.head_dim,
        "layer_norm_epsilon": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "no_bias": True,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "rotary_emb_base": getattr(config.position, "base", None),
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
        "vocab_size": config.vocab_size,
    }


def _write_first_tokenizer(
    tokenizer: BytePairTokenizer, checkpoint: Checkpoint, folder: Path
) -> None:
    """qwen.tiktoken and the template, which the first generation's own code does not read.

    That code names control tokens itself, so another name for one of its ids cannot be kept.
    """
    write_tiktoken(tokenizer, folder / "qwen.tiktoken")
    named: Mapping[str, int] = from_tiktoken(folder / "qwen.tiktoken").control_tokens
    other = {t: i for t, i in tokenizer.control_tokens.items() if named.get(t) != i}
    if other:
        text, token_id = next(iter(other.items()))
        raise TokenizerError(
            f"the control token {text!r} ({token_id}) has another name in the first generation, "
            f"which has {len(named)} of its own."
        )
    settings: dict[str, Any] = {"tokenizer_class": "QWenTokenizer"}
    if checkpoint.chat_template is not None:
        settings["chat_template"] = checkpoint.chat_template
    write_json(folder / "tokenizer_config.json", settings)
