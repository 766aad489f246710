"""Room 4: writes a model with everything that it needs, as a folder or as one GGUF file.

The inverse of `load`: config, weights, tokenizer, chat template and sampling defaults go along, so
that what was written opens and chats as what was read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qwenkit.checkpoint.atomic import replacing
from qwenkit.checkpoint.gguf_metadata import Metadata, shape_metadata, use_metadata
from qwenkit.checkpoint.gguf_write import TensorEntry, write_gguf
from qwenkit.checkpoint.names import given_path
from qwenkit.checkpoint.safetensors_write import DEFAULT_SHARD_BYTES, write_safetensors
from qwenkit.checkpoint.spec import Checkpoint
from qwenkit.checkpoint.storages import BLOCKS, GGML_NUMBERS, PLAIN
from qwenkit.errors import CheckpointError, UsageError, suggest
from qwenkit.formats.ggml import GgmlWeight
from qwenkit.layers.position import ALIBI_BIAS, Alibi, QwenNtk, Rotary, Yarn
from qwenkit.layers.position import Linear as LinearScaling
from qwenkit.load import Loaded
from qwenkit.models.published import NamedTensor, gguf_tensors, published_tensors
from qwenkit.models.spec import ModelConfig, find
from qwenkit.tokenizer import BytePairTokenizer
from qwenkit.tokenizer.export import to_gguf_metadata, write_folder

# The built-in ChatML of the first generation, for files that must carry a template.
CHATML_TEMPLATE = (
    "{% if not messages or messages[0].role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "qwen.tiktoken",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
# What readers take for a folder's weights, whoever wrote it.
_WEIGHTS_FILE = re.compile(
    r"(model(-\d{5}-of-\d{5})?\.safetensors|pytorch_model(-\d{5}-of-\d{5})?\.bin)(\.index\.json)?"
)
# What a file says of itself, or what we say from the record.
_OWN_KEYS = (
    "general.architecture",
    "general.type",
    "general.name",
    "general.license",
    "general.quantized_by",
)
_SHAPE = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
)


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that is made when its turn to be written comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


def save_folder(
    loaded: Loaded,
    folder: str | Path,
    *,
    tokenizer_files: Callable[[Path], None] | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> list[Path]:
    """Write `loaded` as a model folder in the published layout; returns the files of its weights.

    `tokenizer_files` writes the tokenizer; by default it goes along as it was read. Plain weights
    keep the dtype that they were stored in; blocks of a GGUF, which safetensors has no place for,
    become numbers of that dtype. Other quantized formats are written as they are. Of another model
    in the folder, weights, tokenizer and defaults are removed that a reader would take for this
    one's; other files stay. Raises UsageError for the folder that the model was read from,
    CheckpointError when the disk refuses.
    """
    dtype = PLAIN[loaded.record.stored_dtype or "F32"]
    tensors: dict[str, Planned] = {}
    for named in published_tensors(loaded.model):
        if named.storage in BLOCKS:
            tensors[named.name] = Planned(named.shape, dtype, _numbers(named, dtype))
        elif named.storage is None:
            tensors[named.name] = Planned(named.shape, dtype, _cast(named.tensor, dtype))
        else:
            kept = named.tensor
            tensors[named.name] = Planned(tuple(kept.shape), kept.dtype, _cast(kept, kept.dtype))
    published = published_config(loaded.checkpoint, loaded.config)
    config = {**published, "torch_dtype": str(dtype).removeprefix("torch.")}
    return write_model_folder(
        folder,
        loaded.checkpoint,
        config,
        tensors,
        tokenizer_files=tokenizer_files
        or partial(write_same_tokenizer, loaded.tokenizer, loaded.checkpoint),
        shard_bytes=shard_bytes,
    )


def published_config(source: Checkpoint, config: ModelConfig) -> dict[str, Any]:
    """What config.json says; of a GGUF in the architecture's own words, for its own code."""
    write_config = find(str(source.config["model_type"])).write_config
    if source.container != "gguf" or write_config is None:
        return dict(source.config)
    return write_config(config) | {
        k: v for k, v in source.config.items() if k.endswith("_token_id")
    }


def write_same_tokenizer(tokenizer: BytePairTokenizer, source: Checkpoint, folder: Path) -> None:
    """Write the tokenizer of `source` into `folder`: its own files, where it has some."""
    if source.folder is None:
        write_tokenizer(tokenizer, folder, source, source.chat_template)
    else:
        extra = source.tokenizer_config.get("extra_vocab_file")
        copy_files(source.folder, folder, [*TOKENIZER_FILES, *([extra] if extra else [])])


def write_model_folder(
    folder: str | Path,
    source: Checkpoint,
    config: Mapping[str, Any],
    tensors: Mapping[str, Planned],
    *,
    tokenizer_files: Callable[[Path], None],
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> list[Path]:
    """Write a model folder: what `source` says of its use, `config` as config.json, what
    `tokenizer_files` writes, and last the weights, whose files are returned. Raises as
    `save_folder`.
    """
    folder = given_path("folder", folder)
    try:
        if source.folder is not None and folder.resolve() == source.folder.resolve():
            raise UsageError(f"{folder}: is the folder that the model was read from; give another.")
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            (folder / name).unlink(missing_ok=True)
        write_json(folder / "config.json", config)
        if source.generation_config:
            write_json(folder / "generation_config.json", source.generation_config)
        if source.folder is not None:
            copy_files(source.folder, folder, ("LICENSE",))
        tokenizer_files(folder)
        weights = write_safetensors(
            folder / "model.safetensors", _InTurn(tensors), shard_bytes=shard_bytes
        )
        for file in list(folder.iterdir()):
            if file not in weights and _WEIGHTS_FILE.fullmatch(file.name):
                file.unlink()
    except OSError as error:
        taken = isinstance(error, FileExistsError)
        reason = "a file has that name" if taken else error.strerror or error
        raise CheckpointError(
            folder, "folder", f"cannot be written: {reason}; give another."
        ) from error
    return weights


def read_shard_size(given: str | int) -> int:
    """Bytes of a size such as "2048MB", "5GB" or "512MiB". Raises UsageError."""
    match = re.fullmatch(r"(\d{1,15})\s*([KMGT]?)(i?)B?", str(given).strip(), re.IGNORECASE)
    step = 1024 if match and match[3] else 1000
    size = int(match[1]) * step ** " KMGT".index(match[2].upper() or " ") if match else 0
    if not size or isinstance(given, bool):
        raise UsageError(f"shard size: got {given!r}; expected a size such as '2048MB' or '5GB'.")
    return size


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of the files that are there."""
    for name in names:
        if (source / name).is_file():
            with (source / name).open("rb") as read, replacing(target / name) as written:
                shutil.copyfileobj(read, written)


def write_tokenizer(
    tokenizer: BytePairTokenizer, folder: Path, source: Checkpoint, chat_template: str | None
) -> None:
    """Write a tokenizer in today's formats, with the roles that `source` gives to its tokens."""
    write_folder(tokenizer, folder)
    file = folder / "tokenizer_config.json"
    roles = {k: v for k, v in source.tokenizer_config.items() if k.endswith("_token")}
    written = json.loads(file.read_text(encoding="utf-8")) | roles
    write_json(file, written | ({} if chat_template is None else {"chat_template": chat_template}))


def save_gguf(loaded: Loaded, path: str | Path, *, storage: str | None = None) -> None:
    """Write `loaded` as one GGUF file.

    `storage` "F32", "F16" or "BF16" is that of plain matrices (default: as they were stored);
    quantized ones keep their blocks, vectors are fp32. Raises UsageError for what GGUF has no place
    for: an architecture, a format, sliding windows, a way of extending positions.
    """
    path = given_path("path", path)
    tag = (loaded.record.stored_dtype or "F32") if storage is None else storage
    if tag not in ("F32", "F16", "BF16"):
        raise UsageError(f"storage: got {tag!r}. {suggest(tag, ('F32', 'F16', 'BF16'))}")
    write_gguf(path, gguf_metadata(loaded), _gguf_entries(loaded, tag))


def gguf_metadata(loaded: Loaded) -> Metadata:
    """All that a GGUF says of a model beside its tensors; what the source is said to be in a GGUF
    that it came from goes along. Raises UsageError for what GGUF has no place for.
    """
    arch = find(loaded.record.model_type).gguf_arch
    metadata: Metadata = {"general.architecture": arch, "general.type": "model"}
    metadata |= {"general.name": loaded.record.name}
    metadata |= _described(loaded.checkpoint)
    metadata |= shape_metadata(arch, _shape(loaded.config))
    for key, value in to_gguf_metadata(
        loaded.tokenizer, vocab_rows=loaded.config.vocab_size
    ).items():
        metadata[key] = ("str", value) if key.endswith(".merges") else value  # may be empty
    return metadata | _use(loaded)


def _described(checkpoint: Checkpoint) -> Metadata:
    """Texts of a GGUF that say what the model is: its family, makers, version, size, links."""
    return {
        key: value
        for key, value in checkpoint.gguf_metadata.items()
        if key.startswith("general.") and key not in _OWN_KEYS and isinstance(value, str)
    }


def _gguf_entries(loaded: Loaded, tag: str) -> Iterator[TensorEntry]:
    for named in gguf_tensors(loaded.model, find(loaded.record.model_type)):
        if named.storage is not None and named.storage not in GGML_NUMBERS:
            raise UsageError(f"{named.name}: GGUF has no place for {named.storage} weights.")
        own = named.storage or ("F32" if len(named.shape) == 1 else tag)
        plain = named.storage is None
        make = _cast(named.tensor, PLAIN[own]) if plain else _cast(named.tensor, torch.uint8)
        yield named.name, named.shape, own, make


def _use(loaded: Loaded) -> Metadata:
    record, config = loaded.record, loaded.checkpoint.generation_config
    given = config.get("eos_token_id")
    listed = given if isinstance(given, list) else [record.eos_token_id]
    template = CHATML_TEMPLATE if record.chat_format == "chatml" else record.chat_template
    return use_metadata(
        token_ids={"bos": record.bos_token_id, "pad": record.pad_token_id},
        ends=[i for i in listed if i is not None],
        generation_config=config,
        chat_template=template,
        licence=record.licence,
        add_bos_token=record.add_bos_token,
    )


def _shape(config: ModelConfig) -> dict[str, Any]:
    """A config in the words of `config.json`. Raises UsageError for what GGUF cannot say."""
    found = {name: getattr(config, name, None) for name in _SHAPE}
    shared = getattr(config, "shared_expert_intermediate_size", None)
    found["shared_expert_intermediate_size"] = shared or None  # 0: there is none
    if found["rms_norm_eps"] is None:
        found["rms_norm_eps"] = getattr(config, "layer_norm_epsilon", None)
    if any(getattr(config, "windows", ())):
        raise UsageError("sliding_window: GGUF cannot say which layers slide; save a folder.")
    position = config.position
    if isinstance(position, Alibi):
        return found | {"max_alibi_bias": ALIBI_BIAS}
    if not isinstance(position, Rotary):
        raise UsageError(f"GGUF has no keys for {type(position).__name__}; save a folder.")
    found["rope_theta"] = position.base
    scaling = position.scaling
    if isinstance(scaling, QwenNtk) or position.log_n is not None:
        trained = scaling.trained_tokens if isinstance(scaling, QwenNtk) else position.log_n
        found |= {
            "seq_length": trained,
            "use_dynamic_ntk": scaling is not None,
            "use_logn_attn": position.log_n is not None,
        }
    elif isinstance(scaling, LinearScaling):
        found["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Yarn):
        found["rope_scaling"] = _yarn(scaling)
    elif scaling is not None:
        raise UsageError(f"GGUF has no keys for {type(scaling).__name__} scaling; save a folder.")
    return found


def _yarn(scaling: Yarn) -> dict[str, Any]:
    if scaling.mscale is not None or not scaling.truncate:
        raise UsageError("GGUF has no keys for YaRN's mscale and truncate; save a folder.")
    return {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.trained_tokens,
        "attention_factor": scaling.attention_factor,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
    }


def _numbers(named: NamedTensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    assert named.storage is not None
    return lambda: GgmlWeight(named.tensor, str(named.storage)).dequantize(dtype)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: tensor.detach().to(dtype)


class _InTurn(Mapping[str, torch.Tensor]):
    """Tensors that are made when they are written: the first time a name is asked for, only its
    shape and dtype are wanted.
    """

    def __init__(self, tensors: Mapping[str, Planned]) -> None:
        self._tensors = tensors
        self._asked: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        planned = self._tensors[name]
        if name not in self._asked:
            self._asked.add(name)
            return torch.empty(planned.shape, dtype=planned.dtype, device="meta")
        return planned.make()


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object. Raises CheckpointError when the disk refuses."""
    with replacing(file) as output:
        output.write((json.dumps(dict(value), ensure_ascii=False, indent=2) + "\n").encode())
