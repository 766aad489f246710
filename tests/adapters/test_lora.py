"""One adapter at a layer: what it adds, its gradients, merging and unmerging."""

from __future__ import annotations

import pytest
import torch

from qwenkit.adapters.lora import LoraLinear, merged_weight
from qwenkit.adapters.peft_files import LowRank
from qwenkit.errors import UsageError
from qwenkit.formats.packed import PackedWeight
from qwenkit.layers.linear import Linear


def layer(*, quantized: bool = False, seed: int = 0) -> Linear:
    torch.manual_seed(seed)
    linear = Linear(64, 48, bias=True)
    torch.nn.init.normal_(linear.weight)
    torch.nn.init.normal_(linear.bias)
    if quantized:
        weight = PackedWeight.round_to_nearest(linear.weight.detach(), "int4")
        del linear.weight
        linear.weight = weight
    return linear.requires_grad_(False)


def pair(rank: int = 4) -> LowRank:
    return LowRank(torch.randn(rank, 64), torch.randn(48, rank), 1.5)


@pytest.mark.parametrize("quantized", [False, True])
def test_at_first_nothing_changes_and_then_the_product_is_added(quantized: bool) -> None:
    linear, x = layer(quantized=quantized), torch.randn(5, 64)
    plain = linear(x)
    assert torch.equal(LoraLinear(linear, 4, 2.0)(x), plain)
    given = pair()
    expected = plain + x @ given.down.T @ given.up.T * 1.5
    torch.testing.assert_close(LoraLinear.of(linear, given)(x), expected)
    residual = torch.randn(5, 48)
    torch.testing.assert_close(LoraLinear.of(linear, given)(x, residual), residual + expected)


@pytest.mark.parametrize("quantized", [False, True])
def test_only_the_adapter_gets_gradients(quantized: bool) -> None:
    linear = layer(quantized=quantized)
    adapted, x = LoraLinear.of(linear, pair()), torch.randn(5, 64, requires_grad=True)
    adapted(x).square().sum().backward()
    learned = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert learned == {"down", "up"}
    weight = linear.weight if not quantized else linear.weight.dequantize(torch.float32)
    down, up = (p.detach().clone().requires_grad_() for p in (adapted.down, adapted.up))
    again = x.detach().clone().requires_grad_()
    y = again @ weight.detach().T + linear.bias.detach() + again @ down.T @ up.T * 1.5
    y.square().sum().backward()
    for got, want in ((adapted.down, down), (adapted.up, up), (x, again)):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-3)


def test_merging_and_unmerging() -> None:
    linear, x = layer(), torch.randn(5, 64)
    before = linear.weight
    adapted = LoraLinear.of(linear, pair())
    beside = adapted(x)
    adapted.merge()
    assert adapted.is_merged
    torch.testing.assert_close(adapted(x), beside, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear(x), beside, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="merged already"):
        adapted.merge()
    adapted.unmerge()
    assert linear.weight is before
    assert torch.equal(adapted(x), beside)
    with pytest.raises(UsageError, match="not merged"):
        adapted.unmerge()


def test_a_quantized_layer_is_not_merged_in_place() -> None:
    adapted = LoraLinear.of(layer(quantized=True), pair())
    with pytest.raises(UsageError, match="INT4_G32"):
        adapted.merge()
    weight = adapted.linear.weight
    assert isinstance(weight, PackedWeight)
    merged = merged_weight(weight, adapted.low_rank(), torch.float32)
    added = adapted.up @ adapted.down * 1.5
    torch.testing.assert_close(merged, weight.dequantize(torch.float32) + added.detach())
