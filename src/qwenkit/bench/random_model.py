"""Writes random weights of a published shape, to measure speed without weights: a GGUF file, or a
folder in the hub's layout. The same seed gives the same numbers in both.

The vocabulary is the 256 bytes and merges of them: the text means nothing, the sizes are real.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qwenkit.checkpoint.gguf_write import TensorEntry, write_gguf
from qwenkit.checkpoint.safetensors_write import write_safetensors
from qwenkit.errors import UsageError, suggest
from qwenkit.formats.ggml_quantize import QUANTIZERS, quantize_blocks
from qwenkit.models.spec import Architecture, find
from qwenkit.tokenizer.export import write_folder
from qwenkit.tokenizer.gguf import from_gguf

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Progress = Callable[[float], None] | None
_STD = 0.02  # the published initialisation
_NORMAL_TOKEN, _CONTROL_TOKEN = 1, 3  # token types of GGUF
_SEEDS_APART = 1_000_003  # more than any model has tensors
_CLASSES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


def write_random_gguf(
    path: Path,
    config: Mapping[str, Any],
    *,
    storage: str = "Q4_0",
    head_storage: str | None = None,
    seed: int = 0,
    progress: Progress = None,
) -> None:
    """Write random weights of the shape in `config` (a config.json dictionary).

    Matrices are stored as `storage` ("Q4_0", "Q8_0", "BF16" …), embedding and head as
    `head_storage` (default: the same). A matrix whose width the block type does not divide is
    stored as Q8_0, as llama.cpp's converter falls back. Raises UsageError for an unknown storage.
    """
    allowed = [*PLAIN, *QUANTIZERS]
    for name in (storage, head_storage or storage):
        if name not in allowed:
            raise UsageError(f"storage: got {name!r}. {suggest(name, allowed)}")
    architecture = find(str(config["model_type"]))
    weights = _Weights(architecture, config, seed=seed, progress=progress)
    entries = _gguf_entries(
        weights, architecture.gguf_names, storage=storage, head_storage=head_storage or storage
    )
    write_gguf(path, _metadata(architecture.gguf_arch, config), entries)


def write_random_folder(
    folder: Path, config: Mapping[str, Any], *, seed: int = 0, progress: Progress = None
) -> None:
    """Write config.json, bf16 safetensors and tokenizer files into `folder`, which is made."""
    architecture = find(str(config["model_type"]))
    folder.mkdir(parents=True, exist_ok=True)
    write_random_weights(folder / "model.safetensors", config, seed=seed, progress=progress)
    metadata = _metadata(architecture.gguf_arch, config)
    plain = {key: v[1] if isinstance(v, tuple) else v for key, v in metadata.items()}
    tokenizer = from_gguf(plain)
    write_folder(tokenizer, folder)
    end = tokenizer.vocab_size - 1
    whole = dict(config) | {
        "architectures": [_CLASSES[str(config["model_type"])]],
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "eos_token_id": end,
        "bos_token_id": end,
        "use_sliding_window": False,
    }
    (folder / "config.json").write_text(json.dumps(whole, indent=2), encoding="utf-8")


def write_random_weights(
    path: Path, config: Mapping[str, Any], *, seed: int = 0, progress: Progress = None
) -> None:
    """Write bf16 safetensors of the shape in `config`, under their published names."""
    architecture = find(str(config["model_type"]))
    weights = _Weights(architecture, config, seed=seed, progress=progress)
    write_safetensors(path, _Narrow(weights))


class _Weights(Mapping[str, torch.Tensor]):
    """Name to fp32 tensor, made when it is asked for and not kept."""

    def __init__(
        self,
        architecture: Architecture,
        config: Mapping[str, Any],
        *,
        seed: int,
        progress: Progress,
    ) -> None:
        with torch.device("meta"):
            model = architecture.build(architecture.config(config))
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._seeds = {name: seed * _SEEDS_APART + i for i, name in enumerate(self.shapes)}
        self._progress = progress

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seeds[name])
        numbers = torch.empty(self.shapes[name]).normal_(0, _STD, generator=generator)
        if name.endswith("norm.weight"):
            numbers += 1
        if self._progress is not None:
            self._progress((self._seeds[name] % _SEEDS_APART + 1) / len(self.shapes))
        return numbers


class _Narrow(Mapping[str, torch.Tensor]):
    """The same numbers in bf16. The first time a name is asked for, only its shape is wanted."""

    def __init__(self, weights: _Weights) -> None:
        self._weights = weights
        self._asked: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._asked:
            self._asked.add(name)
            return torch.empty(self._weights.shapes[name], dtype=torch.bfloat16, device="meta")
        return self._weights[name].to(torch.bfloat16)


def _gguf_entries(
    weights: _Weights, gguf_names: Mapping[str, str], *, storage: str, head_storage: str
) -> Iterator[TensorEntry]:
    renamed = {ours: theirs for theirs, ours in gguf_names.items()}
    for name, shape in weights.shapes.items():
        number = next((p for p in name.split(".") if p.isdecimal()), "")
        pattern = name.replace(f".{number}.", ".{}.") if number else name
        wanted = head_storage if "embed" in name or "lm_head" in name else storage
        stored = _storage_of(shape, wanted)
        yield (
            renamed[pattern].replace("{}", number),
            shape,
            stored,
            partial(_stored, weights, name, stored),
        )


def _storage_of(shape: tuple[int, ...], storage: str) -> str:
    if len(shape) == 1:
        return "F32"
    return "Q8_0" if storage.endswith("_K") and shape[1] % 256 else storage


def _stored(weights: _Weights, name: str, storage: str) -> torch.Tensor:
    numbers = weights[name]
    return numbers.to(PLAIN[storage]) if storage in PLAIN else quantize_blocks(numbers, storage)


def _metadata(arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    tokens, merges, types = _vocabulary(int(config["vocab_size"]))
    head_dim = int(config["hidden_size"]) // int(config["num_attention_heads"])
    return {
        "general.architecture": arch,
        "general.name": "random weights",
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{arch}.rope.freq_base": float(config["rope_theta"]),
        f"{arch}.rope.dimension_count": head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": ("i32", types),
        "tokenizer.ggml.merges": ("str", merges),
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }


def _vocabulary(size: int) -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges and token types: the byte alphabet, its pairs, triples …, and an end token."""
    alphabet = [chr(b if _printable(b) else 256 + n) for b, n in _byte_order()]
    tokens, merges = list(alphabet), []
    for left in tokens:  # grows while it is read: pairs are followed by triples
        room = max(0, size - 1 - len(tokens))
        for right in alphabet[:room]:
            merges.append(f"{left} {right}")
            tokens.append(left + right)
        if room <= len(alphabet):
            break
    types = [_NORMAL_TOKEN] * len(tokens)
    return [*tokens, "<|endoftext|>"], merges, [*types, _CONTROL_TOKEN]


def _printable(byte: int) -> bool:
    return 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174


def _byte_order() -> Iterator[tuple[int, int]]:
    """Each byte with the count of unprintable bytes before it: GPT-2's byte alphabet."""
    unprintable = 0
    for byte in range(256):
        yield byte, unprintable
        unprintable += not _printable(byte)
