"""What every job of the kernel bench is, and the sizes of a model that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qwenkit.kernels.registry import Arguments

ROWS = (1, 2, 4, 8, 16, 512)
_COLD_BYTES = 256 << 20
_MOST_COPIES = 64
_HEAD_ROWS = 16  # the head computes sampled rows only


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One call: `calls` are argument tuples to go round, `bytes_read` the weights, cache or rows
    that a call reads, `operations` two for each multiply-and-add, `kind` the ceiling of products
    ("fp32", "int8", "bf16"). `torch_calls` is torch's own operator for the same job, if any.
    """

    what: str
    rows: int
    calls: list[Arguments]
    bytes_read: int
    operations: int = 0
    kind: str = "fp32"
    torch_calls: list[Callable[[], Any]] | None = None


Config = Mapping[str, Any]
Builder = Callable[[Config, tuple[int, ...]], Iterator[Job]]


def matrices(config: Config) -> Iterator[tuple[str, int, int]]:
    """(name, rows, columns) of the matrices that decide a model's speed."""
    hidden, ffn = int(config["hidden_size"]), int(config["intermediate_size"])
    head_dim = hidden // int(config["num_attention_heads"])
    qkv = hidden + 2 * int(config["num_key_value_heads"]) * head_dim
    yield "qkv", qkv, hidden
    yield "gate,up", 2 * ffn, hidden
    yield "down", hidden, ffn
    yield "head", int(config["vocab_size"]), hidden


def copy_count(size_bytes: int) -> int:
    """Of a matrix, so many that going round them reads memory."""
    return max(1, min(_MOST_COPIES, _COLD_BYTES // max(size_bytes, 1)))


def rows_of(matrix: str, rows: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of rows that a matrix is multiplied with."""
    return tuple(n for n in rows if matrix != "head" or n <= _HEAD_ROWS)


def random_rows(rows: int, columns: int) -> torch.Tensor:
    """Activations fp32 [rows, columns]."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def head_sizes(config: Config) -> tuple[int, int, int]:
    """Heads, heads of keys, and the width of one."""
    count = int(config["num_attention_heads"])
    return count, int(config["num_key_value_heads"]), int(config["hidden_size"]) // count
