"""Outliers in keys, as Qwen's biases make them: what they do to narrow caches, and what is left of
that with the guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fakes import tiny_model
from qwenkit.bench.forced import ForcedPass
from qwenkit.engine.key_guard import key_guards
from qwenkit.engine.kv import NAMED_DTYPES
from qwenkit.engine.runner import Runner
from qwenkit.kernels import cpu
from qwenkit.kernels.registry import reference_only
from qwenkit.layers.linear import expected_sizes
from qwenkit.layers.norm import RMSNorm
from qwenkit.layers.position import DualChunk, Rotary
from qwenkit.load import Loaded
from qwenkit.models import baichuan, qwen, qwen2
from qwenkit.score import kl_divergence, top1_agreement
from qwenkit.types.extension import NO_EXTENSION

CPU = torch.device("cpu")
OUTLIERS = {28: 1.0, 32 + 27: -1.0, 20: 0.7}  # channels of a head of 64, of slow rotation
IDS = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(1)).tolist()
Guards = Sequence[torch.Tensor | None] | None


@cache
def model(bias: float, layers: tuple[int, ...] = (0, 3)) -> qwen2.Model:
    """Four layers, in `layers` with a few large biases of keys."""
    made = tiny_model(
        hidden_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=4,
        rope_theta=1e6,
    )
    for number, layer in enumerate(made.model.layers):
        attention = cast(Any, layer).self_attn
        attention.q_proj.weight.mul_(0.3)
        attention.k_proj.weight.mul_(0.3)
        for channel, part in OUTLIERS.items():
            if number in layers:
                attention.k_proj.bias[channel] = bias * part
    return made


def forced(
    made: qwen2.Model, kind: str, guards: Guards = None
) -> tuple[torch.Tensor, list[torch.dtype]]:
    """Logits [tokens, vocab_size] over a cache of `kind`, and what its layers are kept in."""
    loaded = cast(Loaded, SimpleNamespace(model=made, config=made.config))
    own = ForcedPass(loaded, IDS, NO_EXTENSION, dtype=NAMED_DTYPES[kind], guards=guards)
    with reference_only():
        logits = torch.cat([own.piece(start)[0] for start in own.starts])
    return logits, own.cache.dtypes


def distance(made: qwen2.Model, kind: str, guards: Guards = None) -> tuple[float, float]:
    """Mean KL from fp32, and the share of tokens after which the same one is likeliest."""
    expected, _ = forced(made, "fp32")
    logits, _ = forced(made, kind, guards)
    agreement = top1_agreement(expected, logits).double().mean().item()
    return kl_divergence(expected, logits).mean().item(), agreement


def test_divisors_are_powers_of_two_where_the_bias_stands_out() -> None:
    guards = key_guards(model(100.0))
    assert guards[1] is guards[2] is None
    guard = guards[0]
    assert guard is not None
    assert guard.shape == (1, 32)
    assert (guard.log2() == guard.log2().round()).all()
    large = (guard[0] >= 8).nonzero().flatten().tolist()
    assert large == [20, 27, 28]  # of channel 59 the partner in rotation is 27
    assert all(each is None for each in key_guards(model(0.0)))


def test_divisors_alone_make_int8_several_times_better() -> None:
    """Biases that are not so large yet that a layer is kept in more bits."""
    made = model(30.0)
    guards = key_guards(made)
    assert forced(made, "int8", guards)[1] == [torch.int8] * 4
    bare, bare_agreement = distance(made, "int8")
    kl, agreement = distance(made, "int8", guards)
    assert kl < bare / 3
    assert agreement > bare_agreement


@pytest.mark.parametrize(
    ("bias", "kind", "wide"),
    [
        (15.0, "int4", torch.int8),
        (30.0, "int4", torch.int8),
        (100.0, "int4", torch.bfloat16),
        (100.0, "int8", torch.bfloat16),
    ],
)
def test_layers_with_outliers_are_kept_in_more_bits(
    bias: float, kind: str, wide: torch.dtype
) -> None:
    made = model(bias)
    guards, own = key_guards(made), NAMED_DTYPES[kind]
    assert forced(made, kind, guards)[1] == [wide, own, own, wide]
    bare, bare_agreement = distance(made, kind)
    kl, agreement = distance(made, kind, guards)
    best, best_agreement = distance(made, "int8" if wide is torch.int8 else "bf16", guards)
    assert kl < min(bare / 10, best + 0.02)
    assert agreement > max(bare_agreement + 0.3, best_agreement - 0.05)


def test_a_guard_changes_nothing_where_nothing_is_rounded() -> None:
    """Powers of two: the same bits, rotated by the fused op or apart in dual chunks."""
    made = model(100.0)
    guards = key_guards(made)
    assert torch.equal(forced(made, "fp32", guards)[0], forced(made, "fp32")[0])
    rotary = made.config.position
    assert isinstance(rotary, Rotary)
    spec = DualChunk(rotary=rotary, chunk_tokens=80, local_tokens=16)
    positions = [cast(Any, layer).self_attn for layer in made.model.layers]
    for attention in positions:
        attention.position = spec
    try:
        assert torch.equal(forced(made, "fp32", guards)[0], forced(made, "fp32")[0])
    finally:
        for attention in positions:
            attention.position = rotary


def test_the_runner_guards_narrow_caches_only() -> None:
    for kind, guarded in (("int8", True), ("int4", True), ("bf16", False), ("auto", False)):
        runner = Runner(
            model(100.0),
            num_blocks=1,
            block_tokens=4,
            device=CPU,
            reference_ops=True,
            kv_dtype=kind,
        )
        assert [guard is not None for guard in runner._cache.guards] == [guarded, 0, 0, guarded]


def test_what_is_expected_is_what_comes_of_normalised_rows() -> None:
    made = model(30.0)
    layer = cast(Any, made.model.layers[0])
    x = torch.randn(20_000, 128, generator=torch.Generator().manual_seed(0))
    keys = layer.self_attn.k_proj(layer.input_layernorm(x))
    measured = keys.square().mean(0).sqrt()
    got = expected_sizes(layer.self_attn.k_proj, layer.input_layernorm)
    torch.testing.assert_close(got, measured, rtol=0.05, atol=0)


def test_a_norm_of_keys_says_how_large_they_are() -> None:
    config = qwen2.read_config(
        {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "num_key_value_heads": 2}
    )
    attention = qwen2.Attention(config, 0)
    attention.k_norm = RMSNorm(8, eps=1e-6)
    attention.k_norm.weight.data = torch.arange(8.0) - 4
    sizes = attention.key_sizes(RMSNorm(16, eps=1e-6))
    assert torch.equal(sizes, (torch.arange(8.0) - 4).abs().expand(2, 8))


def test_the_first_generation_looks_at_the_rows_of_keys() -> None:
    config = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64}
    made = qwen.Model(
        qwen.read_config(config | {"num_hidden_layers": 1, "num_attention_heads": 2})
    ).requires_grad_(False)
    for name, parameter in made.named_parameters():
        parameter.fill_(1.0 if "ln" in name else 0.1)
    bias = cast(Any, made.transformer.h[0]).attn.c_attn.bias
    bias[32 + 16 + 3] = 90.0  # second head's fourth channel, of the keys
    bias[5], bias[70] = 500.0, 500.0  # queries and values are not asked
    [guard] = key_guards(made)
    assert guard is not None
    assert (guard > 1).nonzero().tolist() == [[1, 3]]


def test_a_model_that_cannot_say_has_no_guard() -> None:
    config = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64}
    made = baichuan.Model(
        baichuan.read_config(
            config | {"num_hidden_layers": 2, "num_attention_heads": 2, "z_loss_weight": 0}
        )
    )
    assert key_guards(made) == [None, None]


def test_native_kernels_do_the_same() -> None:
    if cpu.register().variant is None:
        pytest.skip("no native kernels here")
    made = model(30.0)
    loaded = cast(Loaded, SimpleNamespace(model=made, config=made.config))
    for kind in ("int8", "int4"):
        guards = key_guards(made)
        own = ForcedPass(loaded, IDS, NO_EXTENSION, dtype=NAMED_DTYPES[kind], guards=guards)
        native = torch.cat([own.piece(start)[0] for start in own.starts])
        expected, _ = forced(made, kind, guards)
        assert kl_divergence(expected, native).mean() < 2e-3
