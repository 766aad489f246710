"""Small whole numbers in 32-bit words, as GPTQ and AWQ files hold them.

A row of numbers of `bits` each is one run of bits, the first number in the lowest bits of the first
word; with 3 bits numbers lie across the border of two words and 32 of them fill 3 words exactly.
"""

from __future__ import annotations

import torch

BITS = (2, 3, 4, 8)
_WORD = 32


def word_count(count: int, bits: int) -> int:
    """Words that `count` numbers take."""
    return -(-count * bits // _WORD)


def pack_words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., count], each below 2 to the power of `bits`, to int32 [..., word_count].

    What is left of the last word is zero.
    """
    count = numbers.shape[-1]
    words = word_count(count, bits)
    if numbers.numel() == 0:  # torch gives such tensors no strides to be read as words by
        return numbers.new_zeros((*numbers.shape[:-1], words), dtype=torch.int32)
    if bits == 3:
        return _pack_across(numbers, words)
    in_byte = 8 // bits
    padded = torch.nn.functional.pad(numbers, (0, words * 4 * in_byte - count))
    parts = padded.view(*numbers.shape[:-1], words * 4, in_byte)
    octets = parts.new_zeros(parts.shape[:-1])
    for place in range(in_byte):
        octets |= parts[..., place] << (bits * place)
    return octets.view(torch.int32)


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse: int32 [..., word_count] to uint8 [..., count]."""
    if words.numel() == 0:
        return words.new_zeros((*words.shape[:-1], count), dtype=torch.uint8)
    if bits == 3:
        return _unpack_across(words, count)
    octets = _in_order(words).view(torch.uint8)  # [..., words * 4], lowest bits first
    if bits == 8:
        return octets[..., :count]
    mask = (1 << bits) - 1
    parts = [(octets >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)[..., :count]


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """With the strides of its shape, also where a size is one and any stride would do."""
    if words.stride(-1) == 1 and words.is_contiguous():
        return words
    return words.clone(memory_format=torch.contiguous_format)


def _pack_across(numbers: torch.Tensor, words: int) -> torch.Tensor:
    """Three bits: 8 numbers make 3 octets, so that octets can be made a place at a time."""
    octets = words * 4
    triples = -(-octets // 3)
    padded = torch.nn.functional.pad(numbers, (0, triples * 8 - numbers.shape[-1]))
    n = padded.view(*numbers.shape[:-1], triples, 8).unbind(-1)
    first = n[0] | n[1] << 3 | n[2] << 6
    second = n[2] >> 2 | n[3] << 1 | n[4] << 4 | n[5] << 7
    third = n[5] >> 1 | n[6] << 2 | n[7] << 5
    made = torch.stack((first, second, third), -1).flatten(-2)[..., :octets]
    return made.contiguous().view(torch.int32)


def _unpack_across(words: torch.Tensor, count: int) -> torch.Tensor:
    octets = _in_order(words).view(torch.uint8)
    triples = -(-octets.shape[-1] // 3)
    padded = torch.nn.functional.pad(octets, (0, triples * 3 - octets.shape[-1]))
    a, b, c = padded.view(*words.shape[:-1], triples, 3).unbind(-1)
    n = (
        a,
        a >> 3,
        a >> 6 | b << 2,
        b >> 1,
        b >> 4,
        b >> 7 | c << 1,
        c >> 2,
        c >> 5,
    )
    return (torch.stack(n, -1).flatten(-2) & 7)[..., :count]
