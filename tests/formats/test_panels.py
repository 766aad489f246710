"""Every stored form that has panels: the same numbers in them, and the same bytes from them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qwenkit.formats.packed import PackedWeight, pack
from qwenkit.formats.plan import WeightPlan
from qwenkit.formats.spec import formats
from qwenkit.formats.stacked import StackedWeight
from qwenkit.kernels.cpu import bind
from qwenkit.kernels.registry import reference_only
from qwenkit.layers.weight import QuantWeight

# What has no panels on purpose: blocks that are read as they lie, and shapes that do not fit.
_NONE = {"Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"}


def _weights() -> Iterator[tuple[str, QuantWeight]]:
    for format_ in formats():
        for number, case in enumerate(format_.cases()):
            yield f"{format_.name}-{case.weight.storage}-{number}", case.weight


_WITH = [pytest.param(w, id=n) for n, w in _weights() if w.to_packed() is not None]
_weight = pytest.mark.parametrize("weight", _WITH)


def packed_of(weight: QuantWeight) -> PackedWeight:
    packed = pack(weight)
    assert isinstance(packed, PackedWeight)
    return packed


def assert_same_bytes(one: QuantWeight, other: QuantWeight) -> None:
    ours, theirs = one.to_tensors(), other.to_tensors()
    assert ours.keys() == theirs.keys()
    assert one.storage == other.storage
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(_raw(ours[name]), _raw(tensor)), name


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def test_what_has_no_panels_is_known() -> None:
    without = [w for _, w in _weights() if w.to_packed() is None]
    odd = [w for w in without if w.storage not in _NONE]
    assert all(w.shape[1] % 32 for w in odd), odd
    assert {w.storage for w in without} >= _NONE


@_weight
def test_bytes_come_back(weight: QuantWeight) -> None:
    packed = packed_of(weight)
    assert packed.shape == weight.shape
    assert_same_bytes(packed, weight)


@_weight
def test_numbers_are_the_same(weight: QuantWeight) -> None:
    packed = packed_of(weight)
    assert torch.equal(packed.dequantize(torch.float32), weight.dequantize(torch.float32))
    ids = torch.tensor([39 % weight.shape[0], 0, 17, 17])
    expected = weight.rows(ids, torch.float32)
    assert torch.equal(packed.rows(ids, torch.float32), expected)
    bind.register()
    assert torch.equal(packed.rows(ids, torch.float32), expected)


@_weight
def test_some_rows_are_written_as_the_same_numbers(weight: QuantWeight) -> None:
    packed, whole = packed_of(weight), weight.dequantize(torch.float32)
    index = torch.tensor([3, 30, 31, 0])
    for some, rows in (
        (packed.row_range(16, 32), torch.arange(16, 32)),
        (packed.row_range(5, 30), torch.arange(5, 30)),
        (packed.select_rows(index), index),
    ):
        assert torch.equal(some.dequantize(torch.float32), whole[rows])
    part = packed.row_range(0, 16)
    again = type(weight).from_tensors(part.to_tensors(), shape=part.shape, storage=part.storage)
    assert torch.equal(again.dequantize(torch.float32), whole[:16])


@_weight
def test_products_are_those_of_the_numbers(weight: QuantWeight) -> None:
    bind.register()
    packed, numbers = packed_of(weight), weight.dequantize(torch.float32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, weight.shape[1], generator=generator) + numbers[:1] / numbers[:1].std()
    expected = x @ numbers.T
    with reference_only():
        torch.testing.assert_close(packed.matmul(x), expected, rtol=1e-5, atol=1e-5)
    largest = float(expected.abs().max())
    torch.testing.assert_close(packed.matmul(x), expected, rtol=0, atol=1e-2 * largest)


@_weight
def test_projections_and_gates_are_products_one_by_one(weight: QuantWeight) -> None:
    bind.register()
    packed = packed_of(weight)
    norm = torch.rand(weight.shape[1]) + 0.5
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(2))
    from qwenkit.kernels.ops.rms_norm import rms_norm
    from qwenkit.kernels.ops.silu_mul import silu_mul

    alone = packed.matmul(rms_norm(x, norm, 1e-6))
    both = packed.project(x, [packed, packed], [None, None], norm, 1e-6)
    assert both is not None
    assert all(torch.equal(y, alone) for y in both)
    gated = packed.gated(x, packed, norm, 1e-6)
    assert gated is not None
    assert torch.equal(gated, silu_mul(alone, alone))


@_weight
def test_a_plan_packs_slab_by_slab(weight: QuantWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenkit.formats.plan._SLAB_NUMBERS", 16 * weight.shape[1])
    made = WeightPlan().apply("model.layers.0.mlp.up_proj", weight, is_head=False)
    assert isinstance(made, PackedWeight)
    assert_same_bytes(made, weight)
    assert torch.equal(made.dequantize(torch.float32), weight.dequantize(torch.float32))


@_weight
def test_stacked_parts_are_packed_together(weight: QuantWeight) -> None:
    parts = [weight.row_range(0, 16), weight.row_range(16, 32)]
    made = WeightPlan().apply("experts", StackedWeight(parts), is_head=False)
    assert isinstance(made, PackedWeight)
    whole = weight.dequantize(torch.float32)[:32]
    assert torch.equal(made.dequantize(torch.float32), whole)
    assert made.storage == weight.storage
    x, ends = torch.randn(3, weight.shape[1]), torch.tensor([1, 3])
    with reference_only():
        y = made.grouped_matmul(x, ends)
    expected = torch.cat([x[:1] @ whole[:16].T, x[1:] @ whole[16:].T])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
