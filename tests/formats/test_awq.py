"""AWQ's two layouts: vectors made number by number from AutoAWQ's published packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwenkit.errors import CheckpointError, UsageError
from qwenkit.formats.awq import FORMAT, AwqWeight, gemv_words
from qwenkit.formats.spec import claim

ROWS, COLUMNS, SIZE = 24, 128, 32
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
STORAGE = {"qweight": "I32", "qzeros": "I32", "scales": "F16"}


def _made() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    groups = COLUMNS // SIZE
    return {
        "numbers": torch.randint(0, 16, (ROWS, COLUMNS), generator=generator),
        "zeros": torch.randint(0, 16, (ROWS, groups), generator=generator),
        "scales": (torch.rand(ROWS, groups, generator=generator) + 0.5).half(),
    }


def _word(numbers: list[int]) -> int:
    word = sum(n << (4 * place) for place, n in enumerate(numbers))
    return word - (1 << 32) if word >> 31 else word


def _gemm(made: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, source in (("qweight", made["numbers"]), ("qzeros", made["zeros"])):
        across = source.T.tolist()  # rows of the matrix run along a row of the tensor
        tensors[name] = torch.tensor(
            [[_word([row[8 * w + o] for o in ORDER]) for w in range(ROWS // 8)] for row in across],
            dtype=torch.int32,
        )
    return tensors | {"scales": made["scales"].T.contiguous()}


def _gemv(made: dict[str, Any]) -> dict[str, torch.Tensor]:
    numbers, zeros = made["numbers"].tolist(), made["zeros"].tolist()
    words = 4  # four groups of 32 fill half a word, and the kernel reads four words of them
    scales = torch.zeros(ROWS, 8 * words, dtype=torch.float16)
    scales[:, : COLUMNS // SIZE] = made["scales"]
    return {
        "qweight": torch.tensor(
            [[_word(row[8 * w : 8 * w + 8]) for w in range(COLUMNS // 8)] for row in numbers],
            dtype=torch.int32,
        ),
        "qzeros": torch.tensor([[_word(row), 0, 0, 0] for row in zeros], dtype=torch.int32),
        "scales": scales,
    }


@pytest.mark.parametrize(("layout", "lay_out"), [("gemm", _gemm), ("gemv", _gemv)])
def test_a_file_is_read_and_written(layout: str, lay_out: Any) -> None:
    made = _made()
    tensors = lay_out(made)
    tag = f"AWQ4_{layout.upper()}_G{SIZE}"
    weight = AwqWeight.from_tensors(tensors, shape=(ROWS, COLUMNS), storage=tag)
    assert weight.storage == tag
    assert torch.equal(weight.numbers().long(), made["numbers"])
    assert torch.equal(weight.zero_points().long(), made["zeros"])
    wide = [made[n].float().repeat_interleave(SIZE, 1) for n in ("zeros", "scales")]
    expected = (made["numbers"] - wide[0]) * wide[1]
    assert torch.equal(weight.dequantize(torch.float32), expected)
    packed = AwqWeight.from_integers(
        made["numbers"].to(torch.uint8),
        made["scales"].float(),
        made["zeros"].to(torch.uint8),
        layout=layout,
    )
    for name, tensor in packed.to_tensors().items():
        assert torch.equal(tensor, tensors[name]), name


def test_words_of_zero_points_are_those_of_autoawq() -> None:
    # widths of Qwen2-0.5B and 7B, and what calculate_zeros_width gives for them
    assert [gemv_words(896, size) for size in (128, 64, 32)] == [1, 2, 4]
    assert [gemv_words(4864, size) for size in (128, 64, 32)] == [5, 10, 20]
    assert [gemv_words(18944, size) for size in (128, 64, 32)] == [19, 38, 76]


def test_the_config_says_what_it_is() -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    assert claim(STORAGE, config) is FORMAT
    assert FORMAT.tag(STORAGE, config) == "AWQ4_GEMM_G128"
    older = {"w_bit": 4, "q_group_size": -1, "version": "GEMV", "zero_point": True}
    assert FORMAT.tag(STORAGE, older) == "AWQ4_GEMV_G0"
    for wrong in ({"bits": 3}, {"version": "gemv_fast"}, {"group_size": 0}):
        with pytest.raises(CheckpointError, match="quantization_config"):
            FORMAT.tag(STORAGE, config | wrong)


@pytest.mark.parametrize(
    ("name", "change"),
    [("qweight", lambda t: t.T), ("qzeros", lambda t: t[1:]), ("scales", lambda t: t.float())],
)
def test_what_does_not_fit_is_named(name: str, change: Any) -> None:
    tensors = _gemm(_made())
    tensors[name] = change(tensors[name])
    with pytest.raises(CheckpointError, match=f"{name}: got"):
        AwqWeight.from_tensors(tensors, shape=(ROWS, COLUMNS), storage="AWQ4_GEMM_G32")


def test_integers_that_do_not_fit_are_refused() -> None:
    numbers, zeros = torch.full((8, 64), 16, dtype=torch.uint8), torch.zeros(8, 2).to(torch.uint8)
    with pytest.raises(UsageError, match="do not fit four bits"):
        AwqWeight.from_integers(numbers, torch.ones(8, 2), zeros)
    with pytest.raises(UsageError, match="layout: got 'gem'"):
        AwqWeight.from_integers(numbers, torch.ones(8, 2), zeros, layout="gem")
