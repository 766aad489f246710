"""The GGML weight: what it takes, what it refuses, and that it never writes to a file's bytes."""

from __future__ import annotations

import mmap
import warnings
from pathlib import Path

import pytest
import torch

from qwenkit.errors import CheckpointError, KernelError, NonFiniteError
from qwenkit.formats.ggml import FORMAT, GgmlWeight
from qwenkit.formats.spec import claim
from qwenkit.kernels.blocks import BLOCK_LAYOUTS
from qwenkit.kernels.registry import reference_only

_types = pytest.mark.parametrize("block_type", BLOCK_LAYOUTS)


def _weight(block_type: str, rows: int = 5) -> GgmlWeight:
    numbers = torch.randn(rows, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    return GgmlWeight.quantize(numbers, block_type)


@_types
def test_block_types_are_claimed(block_type: str) -> None:
    assert claim({"weight": block_type}, {}) is FORMAT
    assert claim({"weight": block_type, "bias": "F32"}, {}) is FORMAT


@pytest.mark.parametrize("tags", [{"weight": "F16"}, {"qweight": "I32"}, {"weight": "Q4_9"}, {}])
def test_other_tensors_are_not_claimed(tags: dict[str, str]) -> None:
    assert not FORMAT.claim(tags, {})


@_types
def test_a_read_only_file_is_used_in_place(block_type: str, tmp_path: Path) -> None:
    made = _weight(block_type, rows=9)
    file = tmp_path / "blocks"
    file.write_bytes(b"header." + made.blocks.numpy().tobytes())  # an odd offset
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warning that writing to it would be undefined
        flat = torch.frombuffer(mapped, dtype=torch.uint8, offset=7)
    blocks = flat.view(made.blocks.shape)
    weight = GgmlWeight.from_tensors({"weight": blocks}, shape=made.shape, storage=block_type)
    assert weight.blocks.data_ptr() == blocks.data_ptr()
    # Writing anywhere below would end the process: the pages are read-only.
    weight.to(torch.bfloat16)
    weight.check_finite()
    assert weight.blocks.data_ptr() == blocks.data_ptr()
    assert torch.equal(weight.dequantize(torch.float32), made.dequantize(torch.float32))
    ids = torch.tensor([8, 0])
    assert torch.equal(weight.rows(ids, torch.float32), made.rows(ids, torch.float32))
    x = torch.randn(2, made.shape[1], generator=torch.Generator().manual_seed(2))
    with reference_only():
        assert torch.equal(weight.matmul(x), made.matmul(x))


def test_bytes_that_are_not_the_matrix_are_refused() -> None:
    blocks = torch.zeros(4, 36, dtype=torch.uint8)  # two blocks of Q4_0 a row
    make = GgmlWeight.from_tensors
    make({"weight": blocks}, shape=(4, 64), storage="Q4_0")
    with pytest.raises(CheckpointError, match=r"\[4, 36\].*4 × 96 takes.*\[4, 54\]"):
        make({"weight": blocks}, shape=(4, 96), storage="Q4_0")
    with pytest.raises(CheckpointError, match="5 × 64"):
        make({"weight": blocks}, shape=(5, 64), storage="Q4_0")
    with pytest.raises(CheckpointError, match=r"\(4, 65\).*blocks of 32"):
        make({"weight": blocks}, shape=(4, 65), storage="Q4_0")
    with pytest.raises(CheckpointError, match=r"\(4, 0\)"):
        make({"weight": blocks[:, :0]}, shape=(4, 0), storage="Q4_0")
    with pytest.raises(CheckpointError, match="float32"):
        make({"weight": blocks.float()}, shape=(4, 64), storage="Q4_0")
    with pytest.raises(KernelError, match="'Q4_9'"):
        make({"weight": blocks}, shape=(4, 64), storage="Q4_9")


def test_a_nonfinite_scale_is_named_by_row_and_columns() -> None:
    weight = _weight("Q4_1")
    weight.check_finite()
    weight.blocks[3, 20 * 2 + 3] = 0x7C  # the high byte of the third block's minimum
    with pytest.raises(NonFiniteError, match="row 3, columns 64 to 95"):
        weight.check_finite()


@_types
def test_description_says_type_and_shape(block_type: str) -> None:
    assert f"5 × 512, {block_type}" in repr(_weight(block_type))
