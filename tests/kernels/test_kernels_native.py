"""What the native kernels promise beyond the contract of their ops, in every variant that this
machine runs: the same bits in any batch and on any number of threads, exact numbers, any address.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.errors import KernelError
from qwenkit.kernels import build
from qwenkit.kernels.blocks import BLOCK_LAYOUTS, example_blocks
from qwenkit.kernels.cpu.bind import cpu_features, load_kernels
from qwenkit.kernels.cpu.library import Kernel
from qwenkit.kernels.ops.block_dequantize import block_dequantize
from qwenkit.kernels.ops.rotary import rotary

_every_type = pytest.mark.parametrize("block_type", list(BLOCK_LAYOUTS))


@cache
def _load(variant: build.Variant) -> dict[str, Kernel]:
    try:
        if not variant.features <= set(cpu_features()):
            pytest.skip(f"this processor does not run the variant {variant.name}")
        return load_kernels(build.build_variant(variant))
    except KernelError as error:
        pytest.skip(f"no native kernels here: {error}")


@pytest.fixture(params=[pytest.param(v, id=v.name) for v in build.VARIANTS])
def kernels(request: pytest.FixtureRequest) -> dict[str, Kernel]:
    return _load(request.param)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _matrix(block_type: str, rows: int, blocks_per_row: int, seed: int = 0) -> torch.Tensor:
    columns = blocks_per_row * BLOCK_LAYOUTS[block_type].block_columns
    generator = torch.Generator().manual_seed(seed)
    return example_blocks(block_type, (rows, columns), scale=0.02, generator=generator)


def _numbers(tokens: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


@_every_type
def test_dequantized_numbers_are_the_references(
    kernels: dict[str, Kernel], threads: int, block_type: str
) -> None:
    blocks = _matrix(block_type, 301, 2)
    for dtype in (torch.float32, torch.bfloat16):
        got = kernels["block_dequantize"](blocks, block_type, dtype)
        assert torch.equal(got, block_dequantize.reference(blocks, block_type, dtype))


@_every_type
def test_products_are_exact_to_the_rounding_of_fp32(
    kernels: dict[str, Kernel], block_type: str
) -> None:
    for rows, blocks_per_row, tokens in ((1, 1, 1), (70, 9, 1), (70, 9, 20)):
        blocks = _matrix(block_type, rows, blocks_per_row)
        weight = block_dequantize.reference(blocks, block_type, torch.float32).double()
        x = _numbers(tokens, weight.shape[1])
        got = kernels["block_matmul"](x, blocks, block_type).double()
        # Each of n sums and products rounds by at most one part in 2^24; in practice far less.
        bound = (x.double().abs() @ weight.abs().T) * 2**-24 * 8
        assert (got - x.double() @ weight.T).abs().le(bound).all()


@_every_type
def test_a_token_has_the_same_product_in_any_batch(
    kernels: dict[str, Kernel], threads: int, block_type: str
) -> None:
    # Rows and columns that leave remainders of every tile and span two passes over the columns.
    width = 1024 // BLOCK_LAYOUTS[block_type].block_columns + 1
    blocks = _matrix(block_type, 135, width)
    x = _numbers(30, width * BLOCK_LAYOUTS[block_type].block_columns)
    run = kernels["block_matmul"]
    alone = torch.cat([run(row[None], blocks, block_type) for row in x])
    for tokens in (*range(1, 16), 30):
        for first in {0, 30 - tokens}:
            batch = run(x[first : first + tokens], blocks, block_type)
            assert torch.equal(batch, alone[first : first + tokens])
    torch.set_num_threads(3 - threads)
    assert torch.equal(run(x, blocks, block_type), alone)
    assert torch.equal(run(x[:1], blocks, block_type), alone[:1])


@settings(deadline=None, max_examples=40)
@given(
    block_type=st.sampled_from(list(BLOCK_LAYOUTS)),
    rows=st.integers(1, 140),
    blocks_per_row=st.integers(1, 5),
    tokens=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_any_shape_equals_row_by_row(
    block_type: str, rows: int, blocks_per_row: int, tokens: int, seed: int
) -> None:
    run = _load(_best())["block_matmul"]
    blocks = _matrix(block_type, rows, blocks_per_row, seed)
    x = _numbers(tokens, blocks_per_row * BLOCK_LAYOUTS[block_type].block_columns, seed)
    together = run(x, blocks, block_type)
    for token in {0, tokens - 1}:
        assert torch.equal(run(x[token : token + 1], blocks, block_type)[0], together[token])
    assert torch.equal(run(x, blocks[-1:], block_type)[:, 0], together[:, -1])


def _best() -> build.Variant:
    try:
        return build.usable_variants(frozenset(cpu_features()))[0]
    except KernelError as error:
        pytest.skip(f"no native kernels here: {error}")


def test_rows_of_the_small_ops_do_not_depend_on_the_batch(
    kernels: dict[str, Kernel], threads: int
) -> None:
    x, other = _numbers(90, 577), _numbers(90, 577, seed=2)
    normed = kernels["rms_norm"](x, other[0], 1e-6)
    gated = kernels["silu_mul"](x, other)
    heads = _numbers(90, 3 * 6 * 31).view(90, 3 * 31, 6)
    cos, sin = _numbers(90, 3), _numbers(90, 3, seed=3)
    rotated = kernels["rotary"](heads, cos, sin)
    torch.set_num_threads(3 - threads)
    for i in (0, 41, 89):
        row = slice(i, i + 1)
        assert torch.equal(kernels["rms_norm"](x[row], other[0], 1e-6), normed[row])
        assert torch.equal(kernels["silu_mul"](x[row], other[row]), gated[row])
        assert torch.equal(kernels["rotary"](heads[row], cos[row], sin[row]), rotated[row])


def test_the_gate_is_exact_over_its_whole_range(kernels: dict[str, Kernel]) -> None:
    gate = torch.cat([torch.linspace(-120, 120, 40001), torch.tensor([0.0, -0.0, torch.nan])])
    got = kernels["silu_mul"](gate, torch.ones_like(gate)).double()
    want = gate.double() * torch.sigmoid(gate.double())
    error = (got - want).abs() / want.abs().clamp_min(1e-30)
    assert error[gate > -86].max() < 4e-7  # below, the result is nothing beside any other number
    assert got[gate <= -86].abs().max() < 1e-34
    assert got[-1].isnan()


def test_rotation_gives_the_references_numbers(kernels: dict[str, Kernel]) -> None:
    wide = _numbers(5, 12 * 64).view(5, 12, 64)
    angles = _numbers(5, 32) * 100
    for x in (wide, wide[:, 3:7], wide.transpose(0, 1).contiguous().transpose(0, 1)):
        got = kernels["rotary"](x, angles.cos(), angles.sin())
        assert got.is_contiguous()
        assert torch.equal(got, rotary.reference(x, angles.cos(), angles.sin()))


@_every_type
def test_blocks_may_lie_at_any_address_and_rows_apart(
    kernels: dict[str, Kernel], block_type: str
) -> None:
    blocks = _matrix(block_type, 9, 3)
    x = _numbers(3, 3 * BLOCK_LAYOUTS[block_type].block_columns)
    want = kernels["block_matmul"](x, blocks, block_type)
    numbers = kernels["block_dequantize"](blocks, block_type, torch.float32)
    for offset in (1, 2, 3, 7):
        wide = torch.full((9, blocks.shape[1] + 11), 255, dtype=torch.uint8)
        wide[:, offset : offset + blocks.shape[1]] = blocks
        apart = wide[:, offset : offset + blocks.shape[1]]
        assert torch.equal(kernels["block_matmul"](x, apart, block_type), want)
        assert torch.equal(kernels["block_matmul"](x[:1], apart, block_type), want[:1])
        assert torch.equal(kernels["block_dequantize"](apart, block_type, torch.float32), numbers)
    turned = blocks.T.contiguous().T
    assert torch.equal(kernels["block_matmul"](x, turned, block_type), want)


def test_a_narrower_dtype_is_rounded_once_at_the_end(kernels: dict[str, Kernel]) -> None:
    blocks, x = _matrix("Q4_1", 33, 3), _numbers(4, 96).bfloat16()
    got = kernels["block_matmul"](x, blocks, "Q4_1")
    assert torch.equal(got, kernels["block_matmul"](x.float(), blocks, "Q4_1").bfloat16())


def test_default_dtype_and_device_change_nothing(kernels: dict[str, Kernel]) -> None:
    blocks, x = _matrix("Q8_0", 5, 2), _numbers(2, 64)
    want = kernels["block_matmul"](x, blocks, "Q8_0")
    rows = kernels["block_dequantize"](blocks, "Q8_0", torch.float32)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            assert torch.equal(kernels["block_matmul"](x, blocks, "Q8_0"), want)
            assert torch.equal(kernels["block_dequantize"](blocks, "Q8_0", torch.float32), rows)
            heads = x.view(2, 1, 64)
            assert kernels["rotary"](heads, x[:, :32], x[:, 32:]).dtype == torch.float32
            assert kernels["rms_norm"](x, x[0], 1e-6).is_cpu
    finally:
        torch.set_default_dtype(before)


def test_arguments_that_do_not_fit_are_refused_by_name(kernels: dict[str, Kernel]) -> None:
    blocks, x = _matrix("Q4_1", 8, 3), _numbers(2, 96)
    matmul = kernels["block_matmul"]
    with pytest.raises(KernelError, match=r"x \[2, 64\]"):
        matmul(x[:, :64].contiguous(), blocks, "Q4_1")
    with pytest.raises(KernelError, match="whole"):
        matmul(x, blocks[:, :59].contiguous(), "Q4_1")
    with pytest.raises(KernelError, match="int8"):
        matmul(x, blocks.view(torch.int8), "Q4_1")
    with pytest.raises(KernelError, match="meta"):
        matmul(x, blocks.to("meta"), "Q4_1")
    with pytest.raises(KernelError, match="Q4_1"):
        matmul(x, blocks, "Q4_2")
    with pytest.raises(KernelError, match=r"block_matmul.*x \[96\]"):
        matmul(x[0], blocks, "Q4_1")
    with pytest.raises(KernelError, match="float32"):
        kernels["block_dequantize"](x, "Q4_1", torch.float32)
    with pytest.raises(KernelError, match=r"weight \[95\]"):
        kernels["rms_norm"](x, x[0, 1:], 1e-6)
    with pytest.raises(KernelError, match=r"cos \[2, 47\]"):
        kernels["rotary"](x.view(2, 1, 96), x[:, :47], x[:, :48])
    with pytest.raises(KernelError, match="meta"):
        kernels["silu_mul"](x, x.to("meta"))
