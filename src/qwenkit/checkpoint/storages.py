"""How numbers are stored: the tags, sizes and numbers of plain dtypes and of GGML's block types.

The tags of plain dtypes are those of safetensors; block types carry the names and numbers of GGML
(ggml.h). How the bits of a block become numbers is the business of the formats room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

PLAIN: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TAGS: dict[torch.dtype, str] = {dtype: tag for tag, dtype in PLAIN.items()}


@dataclass(frozen=True, slots=True)
class Block:
    """A row of a block type is a run of blocks: `elements` numbers in `size_bytes` bytes each."""

    elements: int
    size_bytes: int


BLOCKS: dict[str, Block] = {
    "Q4_0": Block(32, 18),
    "Q4_1": Block(32, 20),
    "Q5_0": Block(32, 22),
    "Q5_1": Block(32, 24),
    "Q8_0": Block(32, 34),
    "Q8_1": Block(32, 36),
    "Q2_K": Block(256, 84),
    "Q3_K": Block(256, 110),
    "Q4_K": Block(256, 144),
    "Q5_K": Block(256, 176),
    "Q6_K": Block(256, 210),
    "Q8_K": Block(256, 292),
    "IQ4_NL": Block(32, 18),
    "IQ4_XS": Block(256, 136),
}

GGML_NUMBERS: dict[str, int] = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q8_1": 9,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "Q8_K": 15,
    "IQ4_NL": 20,
    "IQ4_XS": 23,
    "I8": 24,
    "I16": 25,
    "I32": 26,
    "I64": 27,
    "F64": 28,
    "BF16": 30,
}
GGML_TAGS: dict[int, str] = {number: tag for tag, number in GGML_NUMBERS.items()}
GGML_UNREAD: dict[int, str] = {
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}


def read_shape(storage: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what `StoredTensor.read` returns: `shape` itself for a plain dtype,
    [..., bytes_per_row] for a block type.

    Raises ValueError when a row is not a whole number of blocks.
    """
    block = BLOCKS.get(storage)
    if block is None:
        return shape
    columns = shape[-1] if shape else 1
    if columns % block.elements:
        raise ValueError(
            f"a row of {columns} numbers is no whole number of {storage} blocks of {block.elements}"
        )
    return (*shape[:-1], columns // block.elements * block.size_bytes)


def read_dtype(storage: str) -> torch.dtype:
    """The dtype of what `StoredTensor.read` returns."""
    return torch.uint8 if storage in BLOCKS else PLAIN[storage]


def size_bytes(storage: str, shape: tuple[int, ...]) -> int:
    """Bytes of a whole tensor, in exact Python integers. Raises ValueError as `read_shape`."""
    return math.prod(read_shape(storage, shape)) * read_dtype(storage).itemsize
