"""Writes a GGUF file with random weights of a published shape, to measure speed without weights.

The vocabulary is the 256 bytes and merges of them: the text means nothing, the sizes are real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qwenkit.checkpoint.gguf_write import TensorEntry, write_gguf
from qwenkit.errors import UsageError, suggest
from qwenkit.formats.ggml_quantize import QUANTIZERS, quantize_blocks
from qwenkit.models.spec import CausalModel, find

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STD = 0.02  # the published initialisation
_NORMAL_TOKEN, _CONTROL_TOKEN = 1, 3  # token types of GGUF


def write_random_gguf(
    path: Path,
    config: Mapping[str, Any],
    *,
    storage: str = "Q4_0",
    head_storage: str | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
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
    with torch.device("meta"):
        model = architecture.build(architecture.config(config))
    tensors = _Tensors(
        model,
        architecture.gguf_names,
        storage=storage,
        head_storage=head_storage or storage,
        seed=seed,
        progress=progress,
    )
    write_gguf(path, _metadata(architecture.gguf_arch, config), tensors.entries())


class _Tensors:
    """Makes each tensor when its turn to be written comes."""

    def __init__(
        self,
        model: CausalModel,
        gguf_names: Mapping[str, str],
        *,
        storage: str,
        head_storage: str,
        seed: int,
        progress: Callable[[float], None] | None,
    ) -> None:
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._gguf_names = {ours: theirs for theirs, ours in gguf_names.items()}
        self._storage, self._head_storage = storage, head_storage
        self._generator = torch.Generator().manual_seed(seed)
        self._progress = progress
        self._done = 0

    def entries(self) -> Iterator[TensorEntry]:
        for name, shape in self._shapes.items():
            number = next((p for p in name.split(".") if p.isdecimal()), "")
            pattern = name.replace(f".{number}.", ".{}.") if number else name
            gguf_name = self._gguf_names[pattern].replace("{}", number)
            storage = self._storage_of(name, shape)
            yield gguf_name, shape, storage, self._maker(shape, storage)

    def _storage_of(self, name: str, shape: tuple[int, ...]) -> str:
        if len(shape) == 1:
            return "F32"
        storage = self._head_storage if "embed" in name or "lm_head" in name else self._storage
        wide = storage.endswith("_K")
        return "Q8_0" if wide and shape[1] % 256 else storage

    def _maker(self, shape: tuple[int, ...], storage: str) -> Callable[[], torch.Tensor]:
        def make() -> torch.Tensor:
            numbers = torch.empty(shape).normal_(0, _STD, generator=self._generator)
            if len(shape) == 1:
                numbers += 1  # a norm's weight
            self._done += 1
            if self._progress is not None:
                self._progress(self._done / len(self._shapes))
            if storage in PLAIN:
                return numbers.to(PLAIN[storage])
            return quantize_blocks(numbers, storage)

        return make


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
