"""Numbers to GGML blocks: golden bytes, bounds, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.errors import NonFiniteError, UsageError
from qwenkit.formats.ggml_quantize import QUANTIZERS, quantize_blocks
from qwenkit.kernels.blocks import BLOCK_LAYOUTS, CHUNK_NUMBERS, unpack_rows

_types = pytest.mark.parametrize("block_type", BLOCK_LAYOUTS)


def _golden_numbers() -> torch.Tensor:
    """The 128 numbers that the golden file describes."""
    index = torch.arange(128)
    numbers = ((index * 7919) % 2003 - 1001).float() / 1024
    numbers[index % 37 == 5] *= 8
    numbers[32:64] = 0
    return numbers.unsqueeze(0)  # [1, 128]


def _round_trip(numbers: torch.Tensor, block_type: str) -> torch.Tensor:
    return unpack_rows(quantize_blocks(numbers, block_type), BLOCK_LAYOUTS[block_type])


def test_every_layout_can_be_made() -> None:
    assert set(QUANTIZERS) == set(BLOCK_LAYOUTS)


@pytest.mark.parametrize("block_type", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_bytes_are_equal_to_the_golden_ones(block_type: str, golden_dir: Path) -> None:
    golden = json.loads((golden_dir / "ggml_blocks.json").read_text())["quantize"][block_type]
    assert quantize_blocks(_golden_numbers(), block_type).numpy().tobytes().hex() == golden


def _searched_numbers() -> tuple[torch.Tensor, torch.Tensor]:
    """Two blocks of 256 numbers and the importances of their columns, as the golden file was made:
    numbers of all sizes, a group of zeros, one of a single number.
    """
    index = torch.arange(512)
    numbers = ((index * 7919) % 2003 - 1001).float() / 1024 * (1 + index % 5)
    numbers[index % 37 == 5] *= 8
    numbers[64:96] = 0
    numbers[300:332] = 0.25
    return numbers.unsqueeze(0), ((index * 31) % 97).float() / 64  # [1, 512], [512]


@_types
@pytest.mark.parametrize("importance", [False, True])
def test_bytes_are_equal_to_those_of_llama_cpp(
    block_type: str, importance: bool, golden_dir: Path
) -> None:
    golden = json.loads((golden_dir / "ggml_quantized.json").read_text())
    numbers, counts = _searched_numbers()
    given = numbers.clone(), counts.clone()
    blocks = quantize_blocks(numbers, block_type, counts if importance else None)
    key = "with importance" if importance else "plain"
    assert blocks.numpy().tobytes().hex() == golden[key][block_type]
    assert torch.equal(numbers, given[0])
    assert torch.equal(counts, given[1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    block_type=st.sampled_from(sorted(BLOCK_LAYOUTS)),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-2, 3),  # below, the K-quants' scales fall under half precision
    shift=st.sampled_from([0.0, 1.0, -3.0]),
)
def test_error_stays_within_a_step(block_type: str, seed: int, exponent: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = BLOCK_LAYOUTS[block_type].block_columns
    numbers = (torch.randn(3, columns, generator=generator) + shift) * 10.0**exponent
    error = (_round_trip(numbers, block_type) - numbers).abs().amax(1)
    # A block's whole range cut into the type's codes; search and rounded scales may clip a little.
    reach = torch.maximum(numbers.abs().amax(1) * 2, numbers.amax(1) - numbers.amin(1))
    bits = int(block_type.removeprefix("I")[1])
    assert (error <= 1.3 * reach / (2**bits - 1) + 1e-6).all()


@_types
def test_zeros_stay_zero(block_type: str) -> None:
    numbers = torch.zeros(2, 256)
    numbers[1, 128:] = -0.0
    assert not _round_trip(numbers, block_type).any()


@_types
def test_one_number_among_zeros_survives(block_type: str) -> None:
    for value in (1.0, -1.0):
        numbers = torch.zeros(1, 256)
        numbers[0, 77] = value
        restored = _round_trip(numbers, block_type)
        assert restored[0, 77] == pytest.approx(value, rel=0.02)
        restored[0, 77] = 0
        assert restored.abs().max() < 0.02


@_types
@pytest.mark.parametrize("size", [1e-9, 1e-30, 1e-42])
def test_numbers_too_small_for_the_scale_become_tiny_not_wild(block_type: str, size: float) -> None:
    numbers = torch.randn(2, 256, generator=torch.Generator().manual_seed(5)) * size
    assert _round_trip(numbers, block_type).abs().max() <= 1e-7


@_types
def test_rows_do_not_depend_on_their_neighbours(block_type: str) -> None:
    columns = 4096
    rows = CHUNK_NUMBERS // columns + 3
    numbers = torch.randn(rows, columns, generator=torch.Generator().manual_seed(6))
    blocks = quantize_blocks(numbers, block_type)
    assert blocks.dtype == torch.uint8
    assert blocks.shape == (rows, BLOCK_LAYOUTS[block_type].bytes_per_row(columns))
    assert torch.equal(quantize_blocks(numbers[-4:], block_type), blocks[-4:])
    strided = torch.stack([numbers, numbers], 2)[..., 1]
    assert torch.equal(quantize_blocks(strided, block_type), blocks)
    assert quantize_blocks(numbers[:0], block_type).shape == (0, blocks.shape[1])


def test_half_precision_goes_through_fp32() -> None:
    numbers = torch.randn(2, 256, generator=torch.Generator().manual_seed(6)).bfloat16()
    for block_type in BLOCK_LAYOUTS:
        expected = quantize_blocks(numbers.float(), block_type)
        assert torch.equal(quantize_blocks(numbers, block_type), expected)


@_types
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38, -1e12])
def test_what_cannot_be_held_is_refused(block_type: str, value: float) -> None:
    numbers = torch.zeros(3, 256)
    numbers[1, 9] = value
    with pytest.raises(NonFiniteError, match=f"{block_type} cannot hold"):
        quantize_blocks(numbers, block_type)


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"'Q4_Z'.*Did you mean 'Q4_"):
        quantize_blocks(torch.zeros(1, 32), "Q4_Z")
    with pytest.raises(UsageError, match=r"Q6_K .*256.*\(3, 896\)"):
        quantize_blocks(torch.zeros(3, 896), "Q6_K")
    with pytest.raises(UsageError, match=r"\(32,\)"):
        quantize_blocks(torch.zeros(32), "Q8_0")
    numbers = torch.zeros(1, 256)
    with pytest.raises(UsageError, match=r"importance: got the shape \[32\]; .* 256 columns"):
        quantize_blocks(numbers, "Q4_K", torch.ones(32))
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="importance: some numbers are negative, NaN"):
            quantize_blocks(numbers, "Q4_K", torch.full((256,), wrong))


@_types
def test_an_error_counts_less_where_it_matters_less(block_type: str) -> None:
    numbers = torch.randn(64, 512, generator=torch.Generator().manual_seed(7))
    counts = torch.where(torch.arange(512) % 8 == 0, 100.0, 0.01)
    plain, weighed = (
        (unpack_rows(quantize_blocks(numbers, block_type, c), BLOCK_LAYOUTS[block_type]) - numbers)
        .square()
        .mul(counts)
        .sum()
        for c in (None, counts)
    )
    assert weighed == plain if block_type == "Q8_0" else weighed < plain


def test_many_rows_with_importances_are_the_rows_one_by_one() -> None:
    numbers = torch.randn(4100, 32, generator=torch.Generator().manual_seed(8))
    counts = torch.rand(32, generator=torch.Generator().manual_seed(9))
    whole = quantize_blocks(numbers, "Q4_0", counts)
    assert torch.equal(whole[4090:], quantize_blocks(numbers[4090:], "Q4_0", counts))
