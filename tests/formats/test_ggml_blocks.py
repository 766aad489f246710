"""GGML blocks to numbers: golden bytes, and the two ops' references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwenkit.errors import KernelError
from qwenkit.kernels.blocks import (
    BLOCK_LAYOUTS,
    CHUNK_NUMBERS,
    block_layout,
    example_blocks,
    first_nonfinite_block,
)
from qwenkit.kernels.ops.block_dequantize import block_dequantize
from qwenkit.kernels.ops.block_matmul import block_matmul
from qwenkit.kernels.registry import Op, reference_only

_types = pytest.mark.parametrize("block_type", BLOCK_LAYOUTS)


def _example(block_type: str, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return example_blocks(block_type, (rows, columns), scale=0.1, generator=generator)


@_types
def test_numbers_are_bit_equal_to_the_golden_ones(block_type: str, golden_dir: Path) -> None:
    golden = json.loads((golden_dir / "ggml_blocks.json").read_text())["dequantize"][block_type]
    blocks = torch.frombuffer(bytearray.fromhex(golden["blocks"]), dtype=torch.uint8)
    numbers = block_dequantize.reference(blocks, block_type, torch.float32)
    assert numbers.numpy().astype("<f4").tobytes().hex() == golden["numbers"]


@_types
def test_chunks_do_not_show(block_type: str) -> None:
    columns = 8192
    rows = 2 * CHUNK_NUMBERS // columns + 5
    blocks = _example(block_type, rows, columns)
    numbers = block_dequantize.reference(blocks, block_type, torch.float32)
    by_row = [block_dequantize.reference(row, block_type, torch.float32) for row in blocks[-9:]]
    assert torch.equal(numbers[-9:], torch.stack(by_row))
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(8))
    y = block_matmul.reference(x, blocks, block_type)
    expected = x @ numbers.T
    assert torch.allclose(y, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("op", [block_dequantize, block_matmul], ids=lambda op: op.name)
def test_cases_are_finite_and_have_the_promised_shape(op: Op) -> None:
    seen = set()
    for arguments in op.cases():
        with reference_only():
            result = op(*arguments)
        promised = op.shape(*arguments)
        assert (result.shape, result.dtype) == (promised.shape, promised.dtype)
        assert torch.isfinite(result).all()
        seen |= {a for a in arguments if isinstance(a, str)}
    assert seen == set(BLOCK_LAYOUTS)


@_types
def test_strided_bytes_read_the_same(block_type: str) -> None:
    width = BLOCK_LAYOUTS[block_type].block_columns
    blocks = _example(block_type, 6, 2 * width)
    odd = torch.zeros(6, blocks.shape[1] + 1, dtype=torch.uint8)
    odd[:, 1:] = blocks  # neither aligned nor dense
    expected = block_dequantize.reference(blocks, block_type, torch.float32)
    assert torch.equal(block_dequantize.reference(odd[:, 1:], block_type, torch.float32), expected)
    assert torch.equal(
        block_dequantize.reference(odd[2, 1:], block_type, torch.float32), expected[2]
    )
    assert torch.equal(
        block_dequantize.reference(odd[::2, 1:], block_type, torch.float32), expected[::2]
    )


def test_matmul_reference_is_differentiable_in_x() -> None:
    blocks = _example("Q4_K", 2000, 256)  # several chunks of rows
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(8), requires_grad=True)
    upstream = torch.randn(2, 2000, generator=torch.Generator().manual_seed(9))
    (gradient,) = torch.autograd.grad(block_matmul(x, blocks, "Q4_K"), x, upstream)
    expected = upstream @ block_dequantize.reference(blocks, "Q4_K", torch.float32)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


class _LargestTemporary(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the bytes of the largest new tensor, but for those of one allowed size."""

    def __init__(self, allowed_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allowed_bytes = allowed_bytes
        self.largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes()
                if size != self.allowed_bytes:
                    self.largest_bytes = max(self.largest_bytes, size)
        return result


@_types
def test_temporaries_are_small_whatever_the_matrix(block_type: str) -> None:
    rows, columns = 1 << 11, 1 << 12
    blocks = _example(block_type, 1, columns).expand(rows, -1)
    with _LargestTemporary(allowed_bytes=rows * columns * 4) as seen:
        block_dequantize.reference(blocks, block_type, torch.float32)
    assert 0 < seen.largest_bytes <= 2 * 4 * CHUNK_NUMBERS
    with _LargestTemporary(allowed_bytes=rows * columns * 4) as seen:
        block_matmul.reference(torch.ones(1, columns), blocks, block_type)
    assert 0 < seen.largest_bytes <= 2 * 4 * CHUNK_NUMBERS


@_types
def test_a_nonfinite_factor_is_found_where_it_is(block_type: str) -> None:
    layout = BLOCK_LAYOUTS[block_type]
    blocks = _example(block_type, 300, 4 * max(layout.block_columns, 256))
    assert first_nonfinite_block(blocks, block_type) is None
    per_row = blocks.shape[1] // layout.block_bytes
    for offset in layout.half_offsets:
        for value in (float("nan"), float("inf"), float("-inf")):
            damaged = blocks.clone()
            half = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
            start = (per_row - 1) * layout.block_bytes + offset
            damaged[291, start : start + 2] = half
            assert first_nonfinite_block(damaged, block_type) == (291, per_row - 1)


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(KernelError, match=r"'Q4_X'.*Did you mean '"):
        block_layout("Q4_X")
    blocks = _example("Q4_0", 2, 64)
    with pytest.raises(KernelError, match="33 bytes"):
        block_dequantize(blocks[:, :33], "Q4_0", torch.float32)
    with pytest.raises(KernelError, match="0 bytes"):
        block_dequantize(blocks[:, :0], "Q4_0", torch.float32)
    with pytest.raises(KernelError, match="48 numbers"):
        BLOCK_LAYOUTS["Q4_0"].bytes_per_row(48)
    with reference_only(), pytest.raises(KernelError, match=r"x has 32 columns.*hold 64"):
        block_matmul(torch.ones(1, 32), blocks, "Q4_0")
