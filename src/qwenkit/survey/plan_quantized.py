"""How many bits a number takes that a `quantization_config` describes: in the file, and in the
panels that native kernels read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qwenkit.formats.compressed_config import schemes
from qwenkit.formats.config import read_quantization

_SCALE, _WIDE = 16, 32  # bits of a scale in fp16 and fp32
_ZERO = 8  # of a zero point in panels
_NESTED_BLOCKS = 256
_PARTS = ("qweight", "weight_packed")
_CODES = ("F8_E4M3", "I8", "U8")


@dataclass(frozen=True, slots=True)
class Quantized:
    """`name` is for people; `stored_bits` and `held_bits` a number's with its share of scales;
    `group` columns share a scale, 0: a row; `rounds` as in `Weights`.
    """

    name: str
    stored_bits: float
    held_bits: float
    group: int
    rounds: bool = True

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Of a matrix in the file."""
        return round(rows * columns * self.stored_bits / 8)

    def held_bytes(self, rows: int, columns: int) -> int:
        """Of a matrix in panels."""
        return round(rows * columns * self.held_bits / 8)


def describe(config: Mapping[str, Any]) -> Quantized | None:
    """What the `quantization_config` of a `config.json` says; None where there is none.

    Raises ConfigError or CheckpointError for what is not read.
    """
    given = read_quantization(config)
    if not given:
        return None
    method = str(given["quant_method"])
    if method in ("gptq", "awq"):
        bits = int(given.get("bits", given.get("w_bit", 4)))
        size = int(given.get("group_size", given.get("q_group_size", 128)))
        group = max(size, 0)
        zeros = 0 if given.get("sym") is True and method == "gptq" else _ZERO
        kept = 8 if bits == 8 else 4
        stored = bits + _share(group, _SCALE + bits)
        return Quantized(
            f"{method} {bits} bits", stored, kept + _share(group, _SCALE + zeros), group
        )
    if method == "bitsandbytes" and given.get("load_in_4bit"):
        return four_bits(
            str(given.get("bnb_4bit_quant_type", "fp4")),
            nested=given.get("bnb_4bit_use_double_quant") is True,
        )
    if method == "bitsandbytes":
        return Quantized("llm.int8", 8, 8, 0)
    if method == "fp8":
        block = given.get("weight_block_size")
        return _fp8(int(block[1]) if isinstance(block, list) else 0)
    scheme = schemes(given)[0]
    if scheme.type == "float":
        return _fp8(scheme.block[1])
    group = scheme.group_size if scheme.strategy == "group" else 0
    zeros = 0 if scheme.symmetric else _ZERO
    stored = scheme.bits + _share(group, _SCALE + (0 if scheme.symmetric else scheme.bits))
    held = scheme.bits + _share(group, _WIDE + zeros)
    return Quantized(f"compressed-tensors {scheme.bits} bits", stored, held, group)


def four_bits(kind: str, *, nested: bool) -> Quantized:
    """NF4 or FP4 in bitsandbytes' blocks of 64."""
    twice = _share(64, 8) + _share(64 * _NESTED_BLOCKS, _WIDE)
    stored = 4 + (twice if nested else _share(64, _WIDE))
    return Quantized(kind, stored, 4 + _share(64, _WIDE) + (twice if nested else 0), 64)


def _fp8(block_columns: int) -> Quantized:
    return Quantized("fp8", 8, 8 + _share(block_columns, _WIDE), 0, rounds=False)


def _share(group: int, bits: int) -> float:
    """Bits that each number of a group has of something; of a row's none worth counting."""
    return bits / group if group else 0.0


def quantized_paths(storages: Mapping[str, str]) -> Iterable[str]:
    """The paths of the quantized layers among tensors, given by names and storage tags."""
    for name, tag in storages.items():
        path, _, part = name.rpartition(".")
        if part in _PARTS or (part == "weight" and tag in _CODES):
            yield path
