"""What the kernel bench runs: for each op a builder of the calls that a model makes of it.

An op without a builder is named in the report as not benched. Weights come in so many copies that
going round them reads memory, as a model does that goes through its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from qwenkit.kernels.blocks import block_layout, example_blocks
from qwenkit.kernels.ops.packed_matmul import Setting
from qwenkit.kernels.packed import KINDS, Packed
from qwenkit.kernels.registry import Arguments

ROWS = (1, 2, 4, 8, 16, 512)
_COLD_BYTES = 256 << 20
_MOST_COPIES = 64
_CACHES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_CONTEXT = 512  # tokens that a decoding sequence has
_BLOCK_TOKENS = 16
_PACKED = (
    Setting("int4", 32),
    Setting("int4", 64),
    Setting("int4", 128),
    Setting("int4", 128, "zeros"),  # AWQ, and GPTQ that is not symmetric
    Setting("nf4", 64, wide=True),
    Setting("int8", 32),
    Setting("int8", 128),
    Setting("llm_int8", wide=True),
    Setting("fp8", 128, wide=True),
    Setting("bf16"),
    Setting("fp32"),
)
_STORED = ("Q4_0", "Q4_1", "Q8_0")
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


def _matrices(config: Config) -> Iterator[tuple[str, int, int]]:
    """(name, rows, columns) of the matrices that decide a model's speed."""
    hidden, ffn = int(config["hidden_size"]), int(config["intermediate_size"])
    head_dim = hidden // int(config["num_attention_heads"])
    qkv = hidden + 2 * int(config["num_key_value_heads"]) * head_dim
    yield "qkv", qkv, hidden
    yield "gate,up", 2 * ffn, hidden
    yield "down", hidden, ffn
    yield "head", int(config["vocab_size"]), hidden


def _copies(size_bytes: int) -> int:
    return max(1, min(_MOST_COPIES, _COLD_BYTES // max(size_bytes, 1)))


def _rows_of(matrix: str, rows: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in rows if matrix != "head" or n <= _HEAD_ROWS)


def _x(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def _packed_matmul(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    generator = torch.Generator().manual_seed(0)
    for name, out, columns in _matrices(config):
        for setting in _PACKED:
            if columns % (setting.group or 1):
                continue
            matrix = setting.matrix(out, columns, generator)
            [one] = _lists([matrix], 1)
            size = _bytes(one)
            copies = list(_lists([matrix], _copies(size)))
            torchs = _torch_products(setting, out, columns, generator)
            for n in _rows_of(name, rows):
                x = _x(n, columns)
                tail = (matrix.kind, matrix.rows, matrix.zero_point, name == "head")
                yield Job(
                    what=f"{name} {out}x{columns} {_name(setting)}",
                    rows=n,
                    calls=[(x, *map(_first, c), None, None, *tail) for c in copies],
                    bytes_read=size,
                    operations=2 * n * out * columns,
                    kind=_ceiling(setting),
                    torch_calls=None if torchs is None else torchs(x),
                )


def _lists(matrices: list[Packed], copies: int) -> Iterator[tuple[list[torch.Tensor], ...]]:
    """(data, scales, minimums) of some matrices together, in so many copies."""
    for _ in range(copies):
        scales = [m.scales.clone() for m in matrices if m.scales is not None]
        mins = [m.mins.clone() for m in matrices if m.mins is not None]
        yield [m.data.clone() for m in matrices], scales, mins


def _bytes(lists: tuple[list[torch.Tensor], ...]) -> int:
    return sum(t.numel() * t.itemsize for tensors in lists for t in tensors)


def _first(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    return tensors[0] if tensors else None


def _name(setting: Setting) -> str:
    group = f" g{setting.group}" if setting.group else ""
    return setting.kind + group + (f" {setting.offsets}" if setting.offsets != "none" else "")


def _ceiling(setting: Setting) -> str:
    """What multiplies, of the ceilings that a machine has."""
    form = KINDS[setting.kind].form
    return {"int4": "int8", "fp8": "fp32"}.get(form, form)


def _packed_together(
    what: str, outs: list[int], columns: int, rows: tuple[int, ...]
) -> Iterator[tuple[str, int, Packed, str, int, torch.Tensor, list[Any]]]:
    """For each kind of weights and number of rows what the fused products have in common: a name,
    bytes, one of the matrices, its ceiling, rows, x and the matrices' copies.
    """
    generator = torch.Generator().manual_seed(0)
    for setting in _PACKED:
        if columns % (setting.group or 1):
            continue
        made = [setting.matrix(out, columns, generator) for out in outs]
        size = _bytes(next(_lists(made, 1)))
        copies = list(_lists(made, _copies(size)))
        name = f"{what} {_name(setting)}"
        for n in rows:
            yield name, size, made[0], _ceiling(setting), n, _x(n, columns), copies


def _packed_projections(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    heads, kv_heads, head_dim = _heads(config)
    hidden, kv = int(config["hidden_size"]), kv_heads * head_dim
    outs, norm = [heads * head_dim, kv, kv], torch.ones(hidden)
    what = f"norm, q {outs[0]} k {kv} v {kv} x{hidden}"
    for name, size, one, ceiling, n, x, copies in _packed_together(what, outs, hidden, rows):
        tail = (one.kind, outs, one.zero_point, [False, False, True])
        yield Job(
            what=name,
            rows=n,
            calls=[(x, norm, 1e-6, *c, [], *tail) for c in copies],
            bytes_read=size,
            operations=2 * n * sum(outs) * hidden,
            kind=ceiling,
        )


def _packed_gated(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    hidden, ffn = int(config["hidden_size"]), int(config["intermediate_size"])
    norm, what = torch.ones(hidden), f"norm, gate and up {ffn}x{hidden}, SwiGLU"
    for name, size, one, ceiling, n, x, copies in _packed_together(what, [ffn, ffn], hidden, rows):
        yield Job(
            what=name,
            rows=n,
            calls=[(x, norm, 1e-6, *c, one.kind, ffn, one.zero_point) for c in copies],
            bytes_read=size,
            operations=4 * n * ffn * hidden,
            kind=ceiling,
        )


def _packed_experts(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    """Gate and up of eight of 64 experts for each token, all of which have the same eight."""
    hidden = int(config["hidden_size"])
    ffn, chosen, experts = 512, 8, 64
    what, outs = f"8 of 64, gate and up {ffn}x{hidden}", [experts * ffn, experts * ffn]
    for name, size, one, ceiling, n, x, copies in _packed_together(what, outs, hidden, rows):
        order = torch.arange(n).repeat(chosen)  # [choices]
        ends = torch.arange(1, experts + 1).clamp(max=chosen) * n
        yield Job(
            what=name,
            rows=n,
            calls=[(x, order, ends, *c, one.kind, ffn, one.zero_point) for c in copies],
            bytes_read=size * chosen // experts,
            operations=4 * n * chosen * ffn * hidden,
            kind=ceiling,
        )


def _torch_products(
    setting: Setting, out: int, columns: int, generator: torch.Generator
) -> Callable[[torch.Tensor], list[Callable[[], Any]]] | None:
    """torch's own product for weights of this kind: x to calls that go round copies."""
    kind, group = setting.kind, setting.group
    if kind not in ("int4", "int8", "bf16", "fp32") or setting.offsets != "none":
        return None
    count = _copies(out * columns * KINDS[kind].bits // 8)
    if kind in ("bf16", "fp32"):
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        first = torch.randn(out, columns, generator=generator).to(dtype)
        plain = [first.clone() for _ in range(count)]
        return lambda x: _each(functional.linear, x.to(dtype), plain)
    aten = torch.ops.aten
    if kind == "int8":
        if group != 128 or not hasattr(aten, "_weight_int8pack_mm"):
            return None  # torch has one scale a row: beside one of ours is enough
        whole = torch.randint(-127, 127, (out, columns), dtype=torch.int8, generator=generator)
        scales = torch.rand(out, generator=generator).to(torch.bfloat16)
        bytes8 = [whole.clone() for _ in range(count)]
        return lambda x: _each(aten._weight_int8pack_mm, x.to(torch.bfloat16), bytes8, scales)
    if not hasattr(aten, "_weight_int4pack_mm_for_cpu") or out % 16:
        return None
    numbers = torch.randint(0, 16, (out, columns), dtype=torch.int32, generator=generator)
    packed = aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    both = torch.rand(columns // group, out, 2, generator=generator).to(torch.bfloat16)
    nibbles = [packed.clone() for _ in range(count)]
    multiply = aten._weight_int4pack_mm_for_cpu
    return lambda x: _each(multiply, x.to(torch.bfloat16), nibbles, group, both)


def _each(
    operator: Callable[..., Any], x: torch.Tensor, weights: list[torch.Tensor], *more: Any
) -> list[Callable[[], Any]]:
    def call(weight: torch.Tensor) -> Callable[[], Any]:
        return lambda: operator(x, weight, *more)

    return [call(weight) for weight in weights]


def _block_matmul(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    generator = torch.Generator().manual_seed(0)
    name, out, columns = next(m for m in _matrices(config) if m[0] == "gate,up")
    for stored in _STORED:
        if columns % block_layout(stored).block_columns:
            continue
        blocks = example_blocks(stored, (out, columns), scale=0.02, generator=generator)
        copies = [blocks.clone() for _ in range(_copies(blocks.numel()))]
        for n in rows:
            x = _x(n, columns)
            yield Job(
                what=f"{name} {out}x{columns} {stored}",
                rows=n,
                calls=[(x, c, stored) for c in copies],
                bytes_read=blocks.numel(),
                operations=2 * n * out * columns,
                kind="int8",
            )


def _packed_rows(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    generator = torch.Generator().manual_seed(0)
    out, columns = int(config["vocab_size"]), int(config["hidden_size"])
    matrix = Setting("int4", 32).matrix(out, columns, generator)
    for n in rows:
        ids = torch.randint(0, out, (n,), generator=generator)
        tail = (matrix.kind, matrix.rows, columns, matrix.zero_point)
        yield Job(
            what=f"embedding {out}x{columns} int4",
            rows=n,
            calls=[(ids, matrix.data, matrix.scales, None, *tail)],
            bytes_read=n * columns // 2,
        )


def _rms_norm(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    width = int(config["hidden_size"])
    weight = torch.ones(width)
    for n in rows:
        x = _x(n, width)
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
        gate, up = _x(n, width), _x(n, width)
        yield Job(
            what=f"{width}",
            rows=n,
            calls=[(gate, up)],
            bytes_read=2 * gate.numel() * gate.itemsize,
            torch_calls=[_bound(lambda g, u: functional.silu(g) * u, gate, up)],
        )


def _heads(config: Config) -> tuple[int, int, int]:
    heads = int(config["num_attention_heads"])
    return heads, int(config["num_key_value_heads"]), int(config["hidden_size"]) // heads


def _rotary(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    heads, _, head_dim = _heads(config)
    for n in rows:
        x = _x(n, heads * head_dim).view(n, heads, head_dim)
        angles = torch.rand(n, head_dim // 2)
        yield Job(
            what=f"{heads} heads of {head_dim}",
            rows=n,
            calls=[(x, angles.cos(), angles.sin())],
            bytes_read=x.numel() * x.itemsize,
        )


def _kv_write(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    _, kv_heads, head_dim = _heads(config)
    for n in rows:
        k = _x(n, kv_heads * head_dim).view(n, kv_heads, head_dim)
        cache = torch.zeros(2, -(-n // _BLOCK_TOKENS), _BLOCK_TOKENS, kv_heads, head_dim)
        yield Job(
            what=f"{kv_heads} heads of {head_dim}",
            rows=n,
            calls=[(k, k, cache[0], cache[1], torch.arange(n))],
            bytes_read=2 * k.numel() * k.itemsize,
        )


def _rotary_kv_write(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    heads, kv_heads, head_dim = _heads(config)
    for n in rows:
        q = _x(n, heads * head_dim).view(n, heads, head_dim)
        k = _x(n, kv_heads * head_dim).view(n, kv_heads, head_dim)
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
    heads, kv_heads, head_dim = _heads(config)
    prompt = n >= _CONTEXT
    sequences = 1 if prompt else n
    tokens = n if prompt else _CONTEXT
    blocks = -(-tokens // _BLOCK_TOKENS)
    q = _x(n, heads * head_dim).view(n, heads, head_dim)
    shape = (2, sequences * blocks, _BLOCK_TOKENS, kv_heads, head_dim)
    size = 2 * sequences * tokens * kv_heads * head_dim * dtype.itemsize
    first = torch.randn(shape).to(dtype)
    caches = [first.clone() for _ in range(1 if prompt else _copies(size))]
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
    "packed_matmul": _packed_matmul,
    "packed_projections": _packed_projections,
    "packed_gated": _packed_gated,
    "packed_experts": _packed_experts,
    "block_matmul": _block_matmul,
    "paged_attention": _paged_attention,
    "packed_rows": _packed_rows,
    "rms_norm": _rms_norm,
    "silu_mul": _silu_mul,
    "rotary": _rotary,
    "kv_write": _kv_write,
    "rotary_kv_write": _rotary_kv_write,
}
