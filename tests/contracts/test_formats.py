"""Every storage format of `qwenkit.formats`, found by scanning, keeps the promises of a weight."""

from __future__ import annotations

import copy

import pytest
import torch

from qwenkit.formats.spec import Case, Format, claim, formats
from qwenkit.kernels.registry import reference_only
from qwenkit.layers.linear import Embedding, Linear
from qwenkit.layers.weight import QuantWeight

_CASES = [
    pytest.param(f, c, id=f"{f.name}-{c.weight.storage}-{i}")
    for f in formats()
    for i, c in enumerate(f.cases())
]
_every_case = pytest.mark.parametrize(("format_", "case"), _CASES)


def _bytes(weight: QuantWeight) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    tensors = weight.to_tensors()
    return {
        n: (t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes())
        for n, t in tensors.items()
    }


def _ids(weight: QuantWeight) -> torch.Tensor:
    last = weight.shape[0] - 1
    return torch.tensor([last, 0, 0, last // 2])


def test_formats_have_distinct_names_and_cases() -> None:
    names = [f.name for f in formats()]
    assert names
    assert len(set(names)) == len(names)
    assert {f.name for f in formats() if any(True for _ in f.cases())} == set(names)


@pytest.mark.parametrize("tag", ["F32", "F16", "BF16", "F64"])
def test_plain_numbers_belong_to_no_format(tag: str) -> None:
    assert claim({"weight": tag}, {}) is None


@_every_case
def test_tensors_round_trip_to_the_same_bytes(format_: Format, case: Case) -> None:
    weight = case.weight
    again = format_.weight.from_tensors(
        weight.to_tensors(), shape=weight.shape, storage=weight.storage
    )
    assert _bytes(again) == _bytes(weight)
    assert again.shape == weight.shape
    assert again.storage == weight.storage
    for name, tensor in again.to_tensors().items():  # kept, not copied
        assert tensor.data_ptr() == weight.to_tensors()[name].data_ptr()


@_every_case
def test_numbers_are_near_the_originals(format_: Format, case: Case) -> None:
    numbers = case.weight.dequantize(torch.float32)
    assert numbers.dtype == torch.float32
    assert tuple(numbers.shape) == case.weight.shape == tuple(case.original.shape)
    error = (numbers - case.original).square().mean().sqrt() / case.original.square().mean().sqrt()
    assert error <= case.relative_error
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(case.weight.dequantize(dtype), numbers.to(dtype))


@_every_case
def test_rows_are_rows_of_the_numbers(format_: Format, case: Case) -> None:
    ids = _ids(case.weight)
    expected = case.weight.dequantize(torch.float32)[ids]
    assert torch.equal(case.weight.rows(ids, torch.float32), expected)
    assert torch.equal(case.weight.rows(ids, torch.bfloat16), expected.to(torch.bfloat16))
    assert torch.equal(case.weight.rows(ids[:0], torch.float32), expected[:0])


@_every_case
def test_selected_rows_stay_quantized(format_: Format, case: Case) -> None:
    ids = _ids(case.weight)
    selected = case.weight.select_rows(ids)
    assert type(selected) is format_.weight
    assert selected.shape == (len(ids), case.weight.shape[1])
    assert selected.storage == case.weight.storage
    assert selected.size_bytes < case.weight.size_bytes
    numbers = case.weight.dequantize(torch.float32)
    assert torch.equal(selected.dequantize(torch.float32), numbers[ids])
    order = torch.randperm(case.weight.shape[0], generator=torch.Generator().manual_seed(1))
    there_and_back = case.weight.select_rows(order).select_rows(order.argsort())
    assert _bytes(there_and_back) == _bytes(case.weight)


@_every_case
def test_matmul_is_multiplication_by_the_numbers(format_: Format, case: Case) -> None:
    columns = case.weight.shape[1]
    x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(2))
    expected = x @ case.weight.dequantize(torch.float32).T
    largest = float(expected.abs().max())
    with reference_only():
        y = case.weight.matmul(x)
    assert torch.allclose(y, expected, rtol=0, atol=1e-5 * largest)
    # A backend may round activations to eight bits; how close it is, the op contract tells.
    y = case.weight.matmul(x)
    assert y.shape == expected.shape
    assert torch.allclose(y, expected, rtol=0, atol=2e-2 * largest)
    for other in (x[0], x[0, 0], x[:, :0]):
        assert case.weight.matmul(other).shape == (*other.shape[:-1], case.weight.shape[0])
    assert case.weight.matmul(x.to(torch.bfloat16)).dtype == torch.bfloat16


@_every_case
def test_a_range_of_rows_is_a_weight(format_: Format, case: Case) -> None:
    part = case.weight.row_range(2, 9)
    assert type(part) is format_.weight
    assert part.shape == (7, case.weight.shape[1])
    numbers = case.weight.dequantize(torch.float32)
    assert torch.equal(part.dequantize(torch.float32), numbers[2:9])


@_every_case
def test_grouped_matmul_is_each_group_with_its_rows(format_: Format, case: Case) -> None:
    groups, columns = 4, case.weight.shape[1]
    out_rows = case.weight.shape[0] // groups
    weight = case.weight.row_range(0, groups * out_rows)
    matrices = weight.dequantize(torch.float32).view(groups, out_rows, columns)
    x = torch.randn(7, columns, generator=torch.Generator().manual_seed(5), requires_grad=True)
    ends = torch.tensor([3, 3, 4, 7])  # the second group has no rows
    owners = torch.tensor([0, 0, 0, 2, 3, 3, 3])
    expected = torch.einsum("rc,rfc->rf", x, matrices[owners])
    largest = float(expected.detach().abs().max())
    y = weight.grouped_matmul(x, ends)
    assert torch.allclose(y, expected, rtol=0, atol=1e-5 * largest)
    upstream = torch.ones_like(y)
    ours, theirs = (torch.autograd.grad(z, x, upstream)[0] for z in (y, expected))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    with torch.no_grad():
        got = weight.grouped_matmul(x, ends)
        assert torch.allclose(got, expected, rtol=0, atol=2e-2 * largest)
        nothing = weight.grouped_matmul(x[:0], torch.zeros_like(ends))
        assert nothing.shape == (0, out_rows)


@_every_case
def test_gradient_reaches_x(format_: Format, case: Case) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, case.weight.shape[1], generator=generator, requires_grad=True)
    y = case.weight.matmul(x)
    upstream = torch.randn(y.shape, generator=generator)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    expected = upstream @ case.weight.dequantize(torch.float32)
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    with torch.no_grad():
        assert not case.weight.matmul(x).requires_grad


@_every_case
def test_casting_a_model_does_not_touch_the_bytes(format_: Format, case: Case) -> None:
    layer = Linear(case.weight.shape[1], case.weight.shape[0], bias=True)
    del layer.weight
    layer.weight = copy.deepcopy(case.weight)
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        layer.to(dtype)
        assert layer.bias is not None
        assert layer.bias.dtype == dtype
        assert isinstance(layer.weight, QuantWeight)
        assert _bytes(layer.weight) == _bytes(case.weight)


@_every_case
def test_a_copy_and_a_state_dict_carry_everything(format_: Format, case: Case) -> None:
    twin = copy.deepcopy(case.weight)
    assert _bytes(twin) == _bytes(case.weight)
    for name, tensor in twin.to_tensors().items():
        assert tensor.data_ptr() != case.weight.to_tensors()[name].data_ptr()
    state = case.weight.state_dict()
    assert state
    for buffer in twin.buffers():
        buffer.zero_()
    twin.load_state_dict(state)
    assert _bytes(twin) == _bytes(case.weight)
    assert not list(case.weight.parameters())


@_every_case
def test_size_is_that_of_the_tensors(format_: Format, case: Case) -> None:
    tensors = case.weight.to_tensors().values()
    assert case.weight.size_bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert case.weight.size_bytes < case.original.numel() * 2  # smaller than half precision


@_every_case
def test_layers_take_the_weight(format_: Format, case: Case) -> None:
    rows, columns = case.weight.shape
    linear = Linear(columns, rows, bias=True)
    embedding = Embedding(rows, columns)
    for layer in (linear, embedding):
        del layer.weight
        layer.weight = case.weight
    assert linear.bias is not None
    torch.nn.init.ones_(linear.bias)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        # torch may add a bias before it rounds
        assert torch.allclose(linear(x), case.weight.matmul(x) + 1, rtol=0, atol=1e-5)
    ids = _ids(case.weight)
    assert torch.equal(embedding(ids, torch.float32), case.weight.rows(ids, torch.float32))
