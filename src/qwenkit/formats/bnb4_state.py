"""The JSON that bitsandbytes writes beside a weight of four bits."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Self

import torch

from qwenkit.errors import CheckpointError, NonFiniteError
from qwenkit.formats.bnb4_quantize import NESTED_SIZE

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class State:
    """What the JSON beside a weight says. `offset` is None unless it was quantized twice."""

    quant_type: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    offset: float | None = None

    @classmethod
    def read(cls, tensor: torch.Tensor, shape: tuple[int, int], storage: str) -> Self:
        """Raises CheckpointError naming the field that is not as expected."""
        try:
            given = json.loads(bytes(tensor.cpu().tolist()))
        except (ValueError, TypeError) as error:
            raise misfit(storage, "quant_state", "is no JSON; the file is damaged.") from error
        if not isinstance(given, dict):
            raise misfit(storage, "quant_state", f"is {given!r} instead of an object.")
        expected = {"quant_type": storage.lower(), "shape": list(shape)}
        for key, value in expected.items():
            if given.get(key) != value:
                found = given.get(key)
                raise misfit(storage, "quant_state", f"{key} is {found!r}, expected {value!r}.")
        size, offset = given.get("blocksize"), given.get("nested_offset")
        if size not in BLOCK_SIZES:
            raise misfit(storage, "quant_state", f"blocksize is {size!r}; allowed: {BLOCK_SIZES}.")
        if offset is not None:
            if given.get("nested_blocksize") != NESTED_SIZE or type(offset) is not float:
                raise misfit(
                    storage,
                    "quant_state",
                    f"nested_blocksize is {given.get('nested_blocksize')!r} and nested_offset "
                    f"{offset!r}; expected {NESTED_SIZE} and a number.",
                )
            if not math.isfinite(offset):
                raise NonFiniteError(f"{storage} weight: its nested_offset is {offset}.")
        return cls(storage.lower(), size, str(given.get("dtype")), shape, offset)

    def write(self) -> torch.Tensor:
        """The JSON as bitsandbytes writes it, uint8."""
        fields: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": self.dtype,
            "shape": self.shape,
        }
        if self.offset is not None:
            fields |= {"nested_blocksize": NESTED_SIZE, "nested_dtype": "float32"}
            fields |= {"nested_offset": self.offset}
        return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def misfit(storage: str, field: str, message: str) -> CheckpointError:
    """What to say of a tensor or field of a weight."""
    return CheckpointError(f"{storage} weight", field, message)
