"""What comes before attention: queries and keys rotated (arXiv 2104.09864), keys and values put
where a paged cache keeps them (arXiv 2309.06180).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwenkit.kernels.ops.kv_write import kv_write
from qwenkit.kernels.ops.rotary import rotary
from qwenkit.kernels.registry import Arguments, Op


def _reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
    guard: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [tokens, heads, head_dim] rotated and then, where there are `factors` [tokens] fp32, times
    the token's; k [tokens, kv_heads, head_dim] rotated and v as it is are written as `kv_write`
    does. cos and sin are [tokens, head_dim / 2].

    A `guard` [kv_heads, head_dim / 2] fp32 divides the rotated keys and multiplies the queries of
    its head's group, number i and number i + head_dim / 2 alike: scores stay what they are, while
    keys that a narrow cache rounds together become equally large.
    """
    keys: torch.Tensor = rotary.reference(k, cos, sin)
    rotated: torch.Tensor = rotary.reference(q, cos, sin)
    if factors is not None:
        rotated = rotated * factors[:, None, None].to(q.dtype)
    if guard is not None:
        divisors = torch.cat((guard, guard), 1).to(k.dtype)  # [kv_heads, head_dim]
        keys = keys / divisors
        rotated = rotated * divisors.repeat_interleave(q.shape[1] // k.shape[1], 0)
    kv_write.reference(keys, v, key_cache, value_cache, slots, key_scales, value_scales)
    return rotated


def _shape(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
    guard: torch.Tensor | None = None,
) -> torch.Tensor:
    return q.new_empty(q.shape)


def _cases() -> Iterator[Arguments]:
    """The cases of `kv_write` whose heads can be rotated, with queries of two groups."""
    generator = torch.Generator().manual_seed(0)
    for k, *rest in kv_write.cases():
        tokens, kv_heads, head_dim = k.shape
        if head_dim % 2:
            continue
        q = torch.randn(tokens, 2 * kv_heads, head_dim, generator=generator).to(k.dtype)
        angles = torch.rand(tokens, head_dim // 2, generator=generator) * 1e4
        v, keys, values, slots, *scales = rest
        scales = scales or [None, None]
        tables = angles.cos(), angles.sin()
        yield q, k, v, *tables, keys, values, slots, *scales
        wide = torch.cat((q, k, v), 1)  # q as a part of something wider
        factors = torch.rand(tokens, generator=generator) + 1
        parts = wide[:, : 2 * kv_heads], k, v, *tables, keys, values, slots, *scales
        yield *parts, factors
        guard = torch.arange(kv_heads * head_dim // 2).view(kv_heads, -1) % 5 + 1.25
        yield *parts, None, guard
        yield *parts, factors, guard


rotary_kv_write = Op(
    name="rotary_kv_write",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) key_cache, "
        "Tensor(b!) value_cache, Tensor slots, Tensor(c!)? key_scales=None, "
        "Tensor(d!)? value_scales=None, Tensor? factors=None, Tensor? guard=None) -> Tensor"
    ),
    reference=_reference,
    shape=_shape,
    cases=_cases,
    tolerance=0.0,
)
