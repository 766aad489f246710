"""A tokenizer and a model small enough to be made in code."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from qwenkit.models import qwen2
from qwenkit.types.protocols import AllowedSpecial

EOS = 256
END = 257


class ByteStream:
    """Bytes to text, whole characters only; control tokens show nothing."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id >= 256 else self._decoder.decode(bytes([token_id]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 and 257 are control tokens."""

    vocab_size = 258
    control_tokens: Mapping[str, int] = MappingProxyType({"<eos>": EOS, "<end>": END})

    def encode(self, text: str, *, allowed_special: AllowedSpecial = ()) -> list[int]:
        return list(text.encode())

    def decode(
        self, ids: Sequence[int], *, skip_special: bool = False, errors: str = "replace"
    ) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<control>"

    def stream(self, *, skip_special: bool = True) -> ByteStream:
        return ByteStream()


def tiny_model(seed: int = 0, **changes: Any) -> qwen2.Model:
    """A random Qwen2 of 272 rows (14 of them padding over `ByteTokenizer`), two layers, GQA."""
    config = {
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    model = qwen2.Model(qwen2.read_config(config | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model.requires_grad_(False)
