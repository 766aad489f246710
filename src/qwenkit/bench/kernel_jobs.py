"""What the kernel bench runs: for each op a builder of the calls that a model makes of it.

An op without a builder is named in the report as not benched. Weights come in so many copies that
going round them reads memory, as a model does that goes through its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

from qwenkit.bench.kernel_job import (
    Builder,
    Config,
    Job,
    copy_count,
    head_sizes,
    matrices,
    random_rows,
)
from qwenkit.bench.kernel_jobs_packed import (
    packed_experts_jobs,
    packed_gated_jobs,
    packed_matmul_jobs,
    packed_projections_jobs,
    packed_rows_jobs,
)
from qwenkit.kernels.blocks import block_layout, example_blocks

_CACHES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_CONTEXT = 512  # tokens that a decoding sequence has
_BLOCK_TOKENS = 16
_STORED = ("Q4_0", "Q4_1", "Q8_0")


def _block_matmul(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    generator = torch.Generator().manual_seed(0)
    name, out, columns = next(m for m in matrices(config) if m[0] == "gate,up")
    for stored in _STORED:
        if columns % block_layout(stored).block_columns:
            continue
        blocks = example_blocks(stored, (out, columns), scale=0.02, generator=generator)
        copies = [blocks.clone() for _ in range(copy_count(blocks.numel()))]
        for n in rows:
            x = random_rows(n, columns)
            yield Job(
                what=f"{name} {out}x{columns} {stored}",
                rows=n,
                calls=[(x, c, stored) for c in copies],
                bytes_read=blocks.numel(),
                operations=2 * n * out * columns,
                kind="int8",
            )


def _rms_norm(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    width = int(config["hidden_size"])
    weight = torch.ones(width)
    for n in rows:
        x = random_rows(n, width)
        yield Job(
            what=f"{width}",
            rows=n,
            calls=[(x, weight, 1e-6)],
            bytes_read=x.numel() * x.itemsize,
            torch_calls=[_bound(functional.rms_norm, x, (width,), weight, 1e-6)],
        )


def _silu_mul(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    width = int(config["intermediate_size"])
    for n in rows:
        gate, up = random_rows(n, width), random_rows(n, width)
        yield Job(
            what=f"{width}",
            rows=n,
            calls=[(gate, up)],
            bytes_read=2 * gate.numel() * gate.itemsize,
            torch_calls=[_bound(lambda g, u: functional.silu(g) * u, gate, up)],
        )


def _rotary(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    heads, _, head_dim = head_sizes(config)
    for n in rows:
        x = random_rows(n, heads * head_dim).view(n, heads, head_dim)
        angles = torch.rand(n, head_dim // 2)
        yield Job(
            what=f"{heads} heads of {head_dim}",
            rows=n,
            calls=[(x, angles.cos(), angles.sin())],
            bytes_read=x.numel() * x.itemsize,
        )


def _kv_write(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    _, kv_heads, head_dim = head_sizes(config)
    for n in rows:
        k = random_rows(n, kv_heads * head_dim).view(n, kv_heads, head_dim)
        cache = torch.zeros(2, -(-n // _BLOCK_TOKENS), _BLOCK_TOKENS, kv_heads, head_dim)
        yield Job(
            what=f"{kv_heads} heads of {head_dim}",
            rows=n,
            calls=[(k, k, cache[0], cache[1], torch.arange(n))],
            bytes_read=2 * k.numel() * k.itemsize,
        )


def _rotary_kv_write(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    heads, kv_heads, head_dim = head_sizes(config)
    for n in rows:
        q = random_rows(n, heads * head_dim).view(n, heads, head_dim)
        k = random_rows(n, kv_heads * head_dim).view(n, kv_heads, head_dim)
        angles = torch.rand(n, head_dim // 2)
        for dtype in _CACHES:
            cache = torch.zeros(2, -(-n // _BLOCK_TOKENS), _BLOCK_TOKENS, kv_heads, head_dim)
            keys, values = cache.to(dtype)
            tail = (angles.cos(), angles.sin(), keys, values, torch.arange(n))
            yield Job(
                what=f"{heads}/{kv_heads} heads of {head_dim} {_CACHES[dtype]}",
                rows=n,
                calls=[(q, k, k, *tail)],
                bytes_read=(q.numel() + 2 * k.numel()) * k.itemsize,
            )


def _paged_attention(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    """So many sequences that decode after 512 tokens; 512 rows are one prompt."""
    for n in rows:
        for dtype in _CACHES:
            yield _attention(config, n, dtype)


def _attention(config: Config, n: int, dtype: torch.dtype) -> Job:
    """Over caches of `dtype`, in so many copies that decoding reads memory; torch's own operator
    has keys and values of that type in one piece.
    """
    heads, kv_heads, head_dim = head_sizes(config)
    prompt = n >= _CONTEXT
    sequences = 1 if prompt else n
    tokens = n if prompt else _CONTEXT
    blocks = -(-tokens // _BLOCK_TOKENS)
    q = random_rows(n, heads * head_dim).view(n, heads, head_dim)
    shape = (2, sequences * blocks, _BLOCK_TOKENS, kv_heads, head_dim)
    size = 2 * sequences * tokens * kv_heads * head_dim * dtype.itemsize
    first = torch.randn(shape).to(dtype)
    caches = [first.clone() for _ in range(1 if prompt else copy_count(size))]
    tables = torch.arange(sequences * blocks).view(sequences, blocks)
    queries = torch.full((sequences,), n // sequences)
    held = torch.full((sequences,), tokens)
    pairs = n * (n + 1) // 2 if prompt else n * tokens
    torch_q = q.view(sequences, -1, heads, head_dim).transpose(1, 2).to(dtype)
    grouped = heads != kv_heads

    def torch_call(cache: torch.Tensor) -> Callable[[], Any]:
        k, v = cache.flatten(1, 2).view(2, sequences, -1, kv_heads, head_dim).transpose(2, 3)
        return lambda: functional.scaled_dot_product_attention(
            torch_q, k, v, is_causal=prompt, enable_gqa=grouped
        )

    place = "prompt" if prompt else "at 512"
    return Job(
        what=f"{heads}/{kv_heads} heads of {head_dim} {place} {_CACHES[dtype]}",
        rows=n,
        calls=[(q, *cache, tables, queries, held, head_dim**-0.5) for cache in caches],
        bytes_read=size,
        operations=4 * pairs * heads * head_dim,
        kind=_CACHES[dtype],
        torch_calls=[torch_call(cache) for cache in caches],
    )


def _bound(operator: Callable[..., Any], *given: Any, **named: Any) -> Callable[[], Any]:
    return lambda: operator(*given, **named)


BUILDERS: dict[str, Builder] = {
    "packed_matmul": packed_matmul_jobs,
    "packed_projections": packed_projections_jobs,
    "packed_gated": packed_gated_jobs,
    "packed_experts": packed_experts_jobs,
    "block_matmul": _block_matmul,
    "paged_attention": _paged_attention,
    "packed_rows": packed_rows_jobs,
    "rms_norm": _rms_norm,
    "silu_mul": _silu_mul,
    "rotary": _rotary,
    "kv_write": _kv_write,
    "rotary_kv_write": _rotary_kv_write,
}
