"""A mixture of experts: the sum over chosen experts, whatever the order the work is done in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from qwenkit.formats.ggml import GgmlWeight
from qwenkit.formats.packed import PackedWeight
from qwenkit.kernels.registry import reference_only
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.moe import SparseMoe
from qwenkit.layers.weight import QuantWeight

HIDDEN, EXPERTS, CHOSEN, WIDTH = 32, 6, 2, 64


def mixture(**changes: Any) -> SparseMoe:
    settings = {
        "num_experts": EXPERTS,
        "experts_per_token": CHOSEN,
        "intermediate_size": WIDTH,
        "normalise": False,
        "shared_intermediate_size": 40,
    }
    layer = SparseMoe(HIDDEN, **(settings | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return layer


def inputs(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1))


def one_by_one(layer: SparseMoe, x: torch.Tensor) -> torch.Tensor:
    """The definition, a token and an expert at a time."""
    experts = layer.experts
    gate, up, down = (
        [m.group_weight(expert) for expert in range(EXPERTS)]
        for m in (experts.gate_proj, experts.up_proj, experts.down_proj)
    )
    outputs = []
    for token in x:
        share = torch.softmax(functional.linear(token, layer.gate.weight), -1)  # type: ignore[arg-type]
        best = share.argsort(descending=True)[: layer.experts_per_token]
        whole = share[best].sum() if layer.normalise else 1.0
        y = torch.zeros_like(token)
        for expert in best:
            hidden = functional.silu(gate[expert] @ token) * (up[expert] @ token)
            y = y + share[expert] / whole * (down[expert] @ hidden)
        if layer.has_shared_expert:
            y = y + torch.sigmoid(layer.shared_expert_gate(token)) * layer.shared_expert(token)
        outputs.append(y)
    return torch.stack(outputs)


def chosen_experts(layer: SparseMoe, x: torch.Tensor) -> set[int]:
    return set(layer.route(x)[1].flatten().tolist())


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("shared", [0, 40])
@pytest.mark.parametrize("tokens", [1, 2, 23])
def test_every_token_gets_the_sum_of_its_experts(tokens: int, shared: int, normalise: bool) -> None:
    layer = mixture(normalise=normalise, shared_intermediate_size=shared).double()
    x = inputs(tokens).double()
    torch.testing.assert_close(layer(x), one_by_one(layer, x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x, residual=x), layer(x) + x)


def test_no_token_is_no_work() -> None:
    assert mixture()(inputs(0)).shape == (0, HIDDEN)


def test_gradients_are_those_of_the_definition() -> None:
    layer, x = mixture(normalise=True).double(), inputs(11).double().requires_grad_(True)
    parameters = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).square().sum(), parameters)
    theirs = torch.autograd.grad(one_by_one(layer, x).square().sum(), parameters)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)


def test_a_token_does_not_depend_on_its_company() -> None:
    layer, x = mixture().double(), inputs(23).double()
    together = layer(x)
    alone = torch.cat([layer(token[None]) for token in x])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_the_weights_of_the_chosen_add_up_to_one_only_when_asked() -> None:
    x = inputs(5)
    assert (mixture().route(x)[0].sum(-1) < 0.999).all()
    torch.testing.assert_close(mixture(normalise=True).route(x)[0].sum(-1), torch.ones(5))


def test_the_router_decides_in_fp32() -> None:
    layer, x = mixture(num_experts=64, experts_per_token=1).bfloat16(), inputs(40).bfloat16()
    logits = layer.gate(x).float()
    assert torch.equal(layer.route(x)[1][:, 0], torch.softmax(logits, -1).argmax(-1))
    assert layer.route(x)[0].dtype == torch.bfloat16


def _quantized(layer: SparseMoe, how: str) -> None:
    for module in (layer.experts.gate_proj, layer.experts.up_proj, layer.experts.down_proj):
        assert isinstance(module.weight, torch.Tensor)
        weight: QuantWeight = GgmlWeight.quantize(module.weight.detach(), "Q8_0")
        if how == "packed":
            weight = PackedWeight.from_tensors(
                weight.to_tensors(), shape=weight.shape, storage="Q8_0"
            )
        del module.weight
        module.weight = weight


def _poison(module: GroupedLinear, experts: set[int]) -> None:
    """Make the numbers of these experts NaN, as they are stored."""
    for expert in experts:
        weight = module.group_weight(expert)
        if isinstance(weight, QuantWeight):
            stored = weight.get_buffer("scales" if isinstance(weight, PackedWeight) else "blocks")
            stored.view(torch.uint8).fill_(0xFF)
        else:
            with torch.no_grad():
                weight.fill_(torch.nan)


@pytest.mark.parametrize("how", ["plain", "blocks", "packed"])
def test_experts_that_no_token_chose_are_not_read(how: str) -> None:
    layer, x = mixture().requires_grad_(False), inputs(2)
    if how != "plain":
        _quantized(layer, how)
    expected = layer(x)
    active = chosen_experts(layer, x)
    assert len(active) < EXPERTS
    for module in (layer.experts.gate_proj, layer.experts.up_proj, layer.experts.down_proj):
        _poison(module, set(range(EXPERTS)) - active)
    assert torch.equal(layer(x), expected)
    _poison(layer.experts.up_proj, active)
    assert layer(x).isnan().any()


@pytest.mark.parametrize("how", ["blocks", "packed"])
def test_quantized_experts_give_what_their_numbers_give(how: str) -> None:
    layer, x = mixture().requires_grad_(False), inputs(17)
    plain = layer(x)
    _quantized(layer, how)
    assert (layer(x) - plain).square().mean() < 1e-3 * plain.square().mean()


@pytest.mark.parametrize("out_features", [32, 24], ids=["whole panels", "parts of panels"])
def test_packed_groups_are_those_of_the_stored_blocks(out_features: int) -> None:
    numbers = torch.randn(3 * out_features, 64, generator=torch.Generator().manual_seed(2))
    blocks = GgmlWeight.quantize(numbers, "Q4_0")
    packed = PackedWeight.from_tensors(blocks.to_tensors(), shape=blocks.shape, storage="Q4_0")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    ends = torch.tensor([1, 1, 5])
    with reference_only():  # native kernels, where another test has put them in, round activations
        expected = blocks.grouped_matmul(x, ends)
        found = packed.grouped_matmul(x, ends)
    near = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=near)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(packed.grouped_matmul(x, ends).sum(), x)
    (other,) = torch.autograd.grad(blocks.grouped_matmul(x, ends).sum(), x)
    torch.testing.assert_close(gradient, other)


def test_groups_have_paths_and_weights_of_their_own() -> None:
    layer = mixture().experts.gate_proj
    paths = list(layer.published_paths("model.layers.1.mlp.experts.gate_proj"))
    assert paths[3] == "model.layers.1.mlp.experts.3.gate_proj"
    assert len(paths) == EXPERTS
    assert isinstance(layer.weight, torch.Tensor)
    assert torch.equal(layer.group_weight(3), layer.weight[3 * WIDTH : 4 * WIDTH])  # type: ignore[arg-type]
