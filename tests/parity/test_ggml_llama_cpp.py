"""GGML blocks against llama.cpp's own C library, reached through llama-cpp-python's wheel."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import pytest
import torch

from qwenkit.formats.ggml_quantize import quantize_blocks
from qwenkit.kernels.blocks import BLOCK_LAYOUTS, example_blocks
from qwenkit.kernels.ops.block_dequantize import block_dequantize

pytestmark = pytest.mark.oracle

_NUMBERS = {  # enum ggml_type
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "IQ4_XS": 23,
}


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("needs llama-cpp-python (make oracles)")
    libraries = sorted((Path(spec.origin).parent / "lib").glob("libggml-base.*"))
    if not libraries:
        pytest.skip("this build of llama-cpp-python has no separate ggml library")
    library = ctypes.CDLL(str(libraries[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return library


def _their_numbers(ggml: ctypes.CDLL, blocks: torch.Tensor, block_type: str) -> torch.Tensor:
    rows = blocks.shape[0]
    result = torch.empty(rows, BLOCK_LAYOUTS[block_type].columns(blocks.shape[1]))
    # Exported as dequantize_row_q4_K, dequantize_row_iq4_nl: only the K is a capital.
    suffix = block_type.lower().replace("_k", "_K")
    function = getattr(ggml, f"dequantize_row_{suffix}")
    function.restype = None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function(blocks.data_ptr(), result.data_ptr(), result.numel())
    return result


def _their_blocks(ggml: ctypes.CDLL, numbers: torch.Tensor, block_type: str) -> torch.Tensor:
    rows, columns = numbers.shape
    result = torch.empty(rows, BLOCK_LAYOUTS[block_type].bytes_per_row(columns), dtype=torch.uint8)
    written = ggml.ggml_quantize_chunk(
        _NUMBERS[block_type], numbers.data_ptr(), result.data_ptr(), 0, rows, columns, None
    )
    assert written == result.numel()
    return result


@pytest.mark.parametrize("block_type", BLOCK_LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, 3e-8, 6e4])
def test_numbers_are_the_same(ggml: ctypes.CDLL, block_type: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(21)
    blocks = example_blocks(block_type, (40, 1024), scale=scale, generator=generator)
    theirs = _their_numbers(ggml, blocks, block_type)
    ours = block_dequantize.reference(blocks, block_type, torch.float32)
    # Their compiler may fuse a product and a difference into one rounding.
    magnitude = theirs.abs().amax(1, keepdim=True)
    assert ((ours - theirs).abs() <= 2e-7 * magnitude).all()


def _matrices() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(22)
    normal = torch.randn(96, 1024, generator=generator) * 0.02
    outliers = normal.clone()
    outliers[:, ::97] *= 30
    heavy = normal * torch.randn(normal.shape, generator=generator).exp()
    return {"normal": normal, "outliers": outliers, "heavy": heavy, "shifted": normal + 0.03}


@pytest.mark.parametrize("block_type", BLOCK_LAYOUTS)
@pytest.mark.parametrize("name", _matrices())
def test_our_error_is_within_a_tenth_of_theirs(
    ggml: ctypes.CDLL, block_type: str, name: str
) -> None:
    matrix = _matrices()[name]
    theirs = _their_numbers(ggml, _their_blocks(ggml, matrix, block_type), block_type)
    ours = _their_numbers(ggml, quantize_blocks(matrix, block_type), block_type)
    their_error = float((theirs - matrix).square().mean().sqrt())
    our_error = float((ours - matrix).square().mean().sqrt())
    assert 0 < our_error <= 1.1 * their_error
