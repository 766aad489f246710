"""Numbers in words, against the layouts as their authors' programs write them, number by number."""

from __future__ import annotations

import pytest
import torch

from qwenkit.formats.words import BITS, pack_words, unpack_words, word_count


def _one_by_one(numbers: list[int], bits: int) -> list[int]:
    """One run of bits, cut into words: number k lies from bit k · bits on."""
    run = sum(number << (bits * place) for place, number in enumerate(numbers))
    words = [(run >> (32 * i)) & 0xFFFFFFFF for i in range(word_count(len(numbers), bits))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def _three_bits_as_published(numbers: list[int]) -> list[int]:
    """32 numbers in three words: ten, then one over the border, ten, one over the border, ten."""
    first = sum(n << (3 * i) for i, n in enumerate(numbers[:10])) | numbers[10] << 30
    second = numbers[10] >> 2 & 1 | sum(n << (3 * i + 1) for i, n in enumerate(numbers[11:21]))
    second |= numbers[21] << 31
    third = numbers[21] >> 1 & 3 | sum(n << (3 * i + 2) for i, n in enumerate(numbers[22:32]))
    words = [word & 0xFFFFFFFF for word in (first, second, third)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [32, 64, 96, 37, 1, 8, 31])
def test_numbers_are_one_run_of_bits(bits: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    numbers = torch.randint(0, 1 << bits, (3, count), generator=generator, dtype=torch.uint8)
    words = pack_words(numbers, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [_one_by_one(row.tolist(), bits) for row in numbers]
    assert torch.equal(unpack_words(words, bits, count), numbers)
    across = pack_words(numbers.T.contiguous().T, bits)  # whatever the memory's order
    assert torch.equal(across, words)


def test_three_bits_lie_as_gptq_published_them() -> None:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(0, 8, (5, 32), generator=generator, dtype=torch.uint8)
    assert pack_words(numbers, 3).tolist() == [
        _three_bits_as_published(r.tolist()) for r in numbers
    ]


def test_nothing_packs_to_nothing() -> None:
    for bits in BITS:
        assert pack_words(torch.zeros(2, 0, dtype=torch.uint8), bits).shape == (2, 0)
        assert unpack_words(torch.zeros(0, 3, dtype=torch.int32), bits, 5).shape == (0, 5)
