"""The jobs of the kernel bench that multiply with packed matrices, or look up rows of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

from qwenkit.bench.kernel_job import (
    Config,
    Job,
    copy_count,
    head_sizes,
    matrices,
    random_rows,
    rows_of,
)
from qwenkit.kernels.ops.packed_matmul import Setting
from qwenkit.kernels.packed import KINDS, Packed

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


def packed_matmul_jobs(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    generator = torch.Generator().manual_seed(0)
    for name, out, columns in matrices(config):
        for setting in _PACKED:
            if columns % (setting.group or 1):
                continue
            matrix = setting.matrix(out, columns, generator)
            [one] = _lists([matrix], 1)
            size = _bytes(one)
            copies = list(_lists([matrix], copy_count(size)))
            torchs = _torch_products(setting, out, columns, generator)
            for n in rows_of(name, rows):
                x = random_rows(n, columns)
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
        copies = list(_lists(made, copy_count(size)))
        name = f"{what} {_name(setting)}"
        for n in rows:
            yield name, size, made[0], _ceiling(setting), n, random_rows(n, columns), copies


def packed_projections_jobs(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
    heads, kv_heads, head_dim = head_sizes(config)
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


def packed_gated_jobs(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
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


def packed_experts_jobs(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
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
    count = copy_count(out * columns * KINDS[kind].bits // 8)
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


def packed_rows_jobs(config: Config, rows: tuple[int, ...]) -> Iterator[Job]:
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
