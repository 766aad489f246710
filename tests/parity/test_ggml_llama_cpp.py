"""GGML blocks against llama.cpp's own C library, reached through llama-cpp-python's wheel."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import pytest
import torch

from qwenkit.checkpoint import open_checkpoint
from qwenkit.formats.ggml import GgmlWeight
from qwenkit.formats.ggml_quantize import QUANTIZERS, quantize_blocks
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


def _their_blocks(
    ggml: ctypes.CDLL,
    numbers: torch.Tensor,
    block_type: str,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    rows, columns = numbers.shape
    result = torch.empty(rows, BLOCK_LAYOUTS[block_type].bytes_per_row(columns), dtype=torch.uint8)
    counts = None if importance is None else importance.data_ptr()
    pointers = numbers.data_ptr(), result.data_ptr()
    written = ggml.ggml_quantize_chunk(_NUMBERS[block_type], *pointers, 0, rows, columns, counts)
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
    zeros = normal.clone()
    zeros[:, 100:700] = 0
    sizes = torch.randint(-12, 5, normal.shape, generator=generator)
    return {
        "normal": normal,
        "bfloat16": normal.bfloat16().float(),
        "outliers": outliers,
        "heavy": normal * torch.randn(normal.shape, generator=generator).exp(),
        "shifted": normal + 0.03,
        "positive": normal.abs(),
        "on a grid": torch.randint(-8, 8, normal.shape, generator=generator) * 0.01,
        "zeros": zeros,
        "flat": torch.full_like(normal, 0.3),
        "wide": normal * 10.0**sizes,
        "tiny": normal * 1e-7,
        "below half precision": normal * 1e-16,
    }


def _importances() -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(23)
    some = (2 * torch.randn(1024, generator=generator)).exp()
    holes = some.clone()
    holes[5:9] = holes[512:768] = 0
    return {"none": None, "some": some, "with zeros": holes}


@pytest.mark.parametrize("block_type", QUANTIZERS)
@pytest.mark.parametrize("name", _matrices())
@pytest.mark.parametrize("importance", _importances())
def test_bytes_are_equal(ggml: ctypes.CDLL, block_type: str, name: str, importance: str) -> None:
    matrix, counts = _matrices()[name], _importances()[importance]
    theirs = _their_blocks(ggml, matrix, block_type, counts)
    assert torch.equal(quantize_blocks(matrix, block_type, counts), theirs)


@pytest.mark.parametrize("block_type", QUANTIZERS)
def test_bytes_of_real_weights_are_equal(
    ggml: ctypes.CDLL, block_type: str, default_model_path: Path
) -> None:
    stored = open_checkpoint(default_model_path).tensors["blk.3.ffn_down.weight"]
    weight = GgmlWeight.from_tensors(
        {"weight": stored.read()},
        shape=(stored.shape[0], stored.shape[1]),
        storage=stored.storage,
    )
    matrix = weight.dequantize(torch.float32)
    counts = matrix.square().mean(0)
    for given in (None, counts):
        theirs = _their_blocks(ggml, matrix, block_type, given)
        assert torch.equal(quantize_blocks(matrix, block_type, given), theirs)


def test_importances_of_wide_rows_are_equal(ggml: ctypes.CDLL) -> None:
    """The mean square of a row is a sum of many numbers, whose order tells."""
    generator = torch.Generator().manual_seed(24)
    matrix = torch.randn(40, 8192, generator=generator)
    counts = torch.rand(8192, generator=generator)
    for block_type in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        theirs = _their_blocks(ggml, matrix, block_type, counts)
        assert torch.equal(quantize_blocks(matrix, block_type, counts), theirs)
