"""Packed weights: stored bytes come back as they were, and rounding is to the nearest."""

from __future__ import annotations

import pytest
import torch

from qwenkit.errors import CheckpointError, NonFiniteError, UsageError
from qwenkit.formats.ggml import GgmlWeight
from qwenkit.formats.packed import GROUP_SIZES, PackedWeight, fitting_group, pack
from qwenkit.kernels.cpu import bind
from qwenkit.kernels.registry import reference_only
from qwenkit.layers.weight import QuantWeight

BLOCKS = ("Q4_0", "Q4_1", "Q8_0")
TAGS = {"Q4_0": 4.5, "Q4_1": 5, "Q8_0": 8.5, "BF16": 16, "F32": 32}  # bits per number
TAGS |= {f"INT{bits}_G{g}": bits + 16 / g for bits in (4, 8) for g in GROUP_SIZES}
_tags = pytest.mark.parametrize("tag", TAGS)
_rows = pytest.mark.parametrize("rows", [1, 16, 37])


def numbers(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.02


def made(tag: str, rows: int = 37, columns: int = 256) -> PackedWeight:
    weight = numbers(rows, columns)
    if tag in BLOCKS:
        packed = pack(GgmlWeight.quantize(weight, tag))
    elif tag in ("BF16", "F32"):
        packed = pack(weight.to(torch.bfloat16) if tag == "BF16" else weight)
    else:
        kind, group = tag.lower().split("_g")
        packed = PackedWeight.round_to_nearest(weight, kind, group_size=int(group))
    assert isinstance(packed, PackedWeight)
    assert packed.storage == tag
    return packed


def equal(one: QuantWeight, other: QuantWeight) -> bool:
    ours, theirs = dict(one.named_buffers()), dict(other.named_buffers())
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


@_rows
@pytest.mark.parametrize("tag", BLOCKS)
def test_blocks_come_back_and_mean_the_same(tag: str, rows: int) -> None:
    stored = GgmlWeight.quantize(numbers(rows, 96), tag)
    packed = pack(stored)
    assert isinstance(packed, PackedWeight)
    assert packed.shape == stored.shape
    (name,), (blocks,) = zip(*packed.to_tensors().items(), strict=True)
    assert name == "weight"
    assert torch.equal(blocks, stored.blocks)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(packed.dequantize(dtype), stored.dequantize(dtype))


@pytest.mark.parametrize("tag", BLOCKS)
def test_every_byte_of_a_block_comes_back(tag: str) -> None:
    width = made(tag).to_tensors()["weight"].shape[1]  # of 256 columns
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (19, width), dtype=torch.uint8, generator=generator)
    packed = PackedWeight.from_tensors({"weight": blocks}, shape=(19, 256), storage=tag)
    assert torch.equal(packed.to_tensors()["weight"], blocks)


@_rows
@pytest.mark.parametrize(("dtype", "columns"), [(torch.float32, 7), (torch.bfloat16, 6)])
def test_plain_numbers_come_back(dtype: torch.dtype, columns: int, rows: int) -> None:
    weight = numbers(rows, columns).to(dtype)
    weight[0, :2] = torch.tensor([-0.0, torch.inf])
    packed = pack(weight)
    assert isinstance(packed, PackedWeight)
    again = packed.to_tensors()["weight"]
    assert again.dtype == dtype
    assert torch.equal(again.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(packed.dequantize(dtype), weight)


@_tags
@_rows
def test_tensors_lead_back_to_the_same_weight(tag: str, rows: int) -> None:
    packed = made(tag, rows)
    tensors = packed.to_tensors()
    again = PackedWeight.from_tensors(tensors, shape=packed.shape, storage=tag)
    assert equal(again, packed)
    assert {n: t.dtype for n, t in again.to_tensors().items()} == {
        n: t.dtype for n, t in tensors.items()
    }
    for name, tensor in again.to_tensors().items():
        assert torch.equal(tensor, tensors[name])
    assert sum(t.nbytes for t in tensors.values()) == TAGS[tag] * rows * 256 / 8


@_tags
def test_rows_and_ranges(tag: str) -> None:
    packed = made(tag)
    whole = packed.dequantize(torch.float32)
    index = torch.tensor([36, 0, 17, 17])
    assert torch.equal(packed.select_rows(index).dequantize(torch.float32), whole[index])
    assert torch.equal(packed.rows(index, torch.float32), whole[index])
    for start, stop in ((0, 16), (16, 37), (16, 32), (0, 37), (5, 21), (36, 37)):
        part = packed.row_range(start, stop)
        assert part.shape == (stop - start, 256)
        assert torch.equal(part.dequantize(torch.float32), whole[start:stop])
        is_view = part.data.untyped_storage().data_ptr() == packed.data.untyped_storage().data_ptr()
        assert is_view == (start % 16 == 0), "whole panels are not copied"


@_tags
def test_products_are_those_of_its_numbers(tag: str) -> None:
    packed = made(tag)
    x, bias, residual = numbers(3, 256, 1), numbers(1, 37, 2)[0], numbers(3, 37, 3)
    want = x @ packed.dequantize(torch.float32).T + bias + residual
    with reference_only():
        got = packed.matmul(x, bias, residual)
        assert torch.equal(packed.matmul(x[None], bias, residual[None])[0], got)
    torch.testing.assert_close(got, want)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(packed.matmul(x, bias, residual).sum(), x)
    torch.testing.assert_close(gradient, packed.dequantize(torch.float32).sum(0).expand(3, -1))


@pytest.mark.parametrize("out_rows", [16, 32, 24])
@pytest.mark.parametrize("tag", ["Q4_1", "Q8_0", "INT4_G32", "F32"])
def test_groups_multiply_as_their_ranges(tag: str, out_rows: int) -> None:
    bind.register()
    packed = made(tag, rows=3 * out_rows)
    x, ends = numbers(7, 256, 1), torch.tensor([4, 4, 7])
    parts = [packed.row_range(g * out_rows, (g + 1) * out_rows) for g in (0, 2)]
    want = torch.cat([parts[0].matmul(x[:4]), parts[1].matmul(x[4:])])
    assert torch.equal(packed.grouped_matmul(x, ends), want)
    assert packed.grouped_matmul(x[:0], torch.tensor([0, 0, 0])).shape == (0, out_rows)


@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize(("kind", "steps"), [("int4", 8), ("int8", 127)])
def test_rounding_is_to_the_nearest(kind: str, steps: int, group: int) -> None:
    weight = numbers(33, 512)
    packed = PackedWeight.round_to_nearest(weight, kind, group_size=group)
    error = (packed.dequantize(torch.float32) - weight).view(33, -1, group)
    most = weight.view(33, -1, group).abs().amax(2, keepdim=True)
    # Half a step, and what the scale itself loses as fp16. Of int4 a number as large as the
    # largest but of the other sign is one step away, as there are eight levels below zero and seven
    # above.
    step = most / steps
    limit = 0.5 * step * 1.001 + most * 2**-11
    if kind == "int4":
        opposite = (weight.view(33, -1, group).abs() > 7.5 * step) & (error.abs() > limit)
        assert not (error.abs() > 1.01 * step).any()
        assert opposite.float().mean() < 0.01
        error = error.masked_fill(opposite, 0)
    assert (error.abs() <= limit).all()
    # The root mean square is close to that of an even spread over a step.
    ratio = error.square().mean().sqrt() / (step.square().mean().sqrt() / 12**0.5)
    assert 0.9 < ratio < 1.1


@pytest.mark.parametrize("kind", ["int4", "int8", "bf16", "fp32"])
def test_zeros_and_exact_numbers_stay(kind: str) -> None:
    weight = torch.zeros(2, 64)
    weight[1, ::2] = -0.5
    packed = PackedWeight.round_to_nearest(weight, kind)
    got = packed.dequantize(torch.float32)
    torch.testing.assert_close(got, weight, rtol=2**-10, atol=0)
    assert torch.equal(got[0], weight[0])
    half = PackedWeight.round_to_nearest(weight.half(), kind)
    assert torch.equal(half.dequantize(torch.float32), got)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e9])
def test_what_cannot_be_rounded_is_refused(bad: float) -> None:
    weight = numbers(2, 64)
    weight[1, 3] = bad
    with pytest.raises(NonFiniteError):
        PackedWeight.round_to_nearest(weight, "int4")


def test_the_group_is_the_largest_that_fits() -> None:
    wanted = [(4096, 128), (4096, 32), (192, 128), (96, 128), (32, 64)]
    assert [fitting_group(*w) for w in wanted] == [128, 32, 64, 32, 32]
    weight = numbers(1, 192)
    assert PackedWeight.round_to_nearest(weight, "int8").storage == "INT8_G64"
    assert PackedWeight.round_to_nearest(weight, "int4").storage == "INT4_G32"
    with pytest.raises(UsageError, match="group_size: got 48; choose one of 32, 64 and 128"):
        fitting_group(4096, 48)
    with pytest.raises(UsageError, match="rows of 100 numbers are no multiple of 32"):
        fitting_group(100, 128)


def test_unknown_kinds_and_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"weights: got 'int5'\. .*'int[48]'"):
        PackedWeight.round_to_nearest(numbers(1, 32), "int5")
    with pytest.raises(UsageError, match="33 columns"):
        PackedWeight.round_to_nearest(numbers(1, 33), "int4")
    for tag in TAGS:
        tensors = made(tag).to_tensors()
        with pytest.raises(CheckpointError, match="weight"):
            PackedWeight.from_tensors(tensors, shape=(36, 256), storage=tag)
    with pytest.raises(CheckpointError, match="Q4_9"):
        PackedWeight.from_tensors(tensors, shape=(37, 256), storage="Q4_9")


@pytest.mark.parametrize(
    "weight",
    [
        numbers(3, 5).to(torch.bfloat16),  # an odd number of columns
        numbers(3, 4)[0],
        GgmlWeight.quantize(numbers(3, 256), "Q6_K"),
    ],
    ids=["odd", "vector", "Q6_K"],
)
def test_what_has_no_packed_form_is_left(weight: torch.Tensor | QuantWeight) -> None:
    assert pack(weight) is weight


def test_half_precision_is_packed_as_fp32() -> None:
    weight = numbers(3, 5).half()
    packed = pack(weight)
    assert isinstance(packed, PackedWeight)
    assert packed.storage == "F32"
    assert torch.equal(packed.dequantize(torch.float32), weight.float())
