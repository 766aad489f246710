"""The paged KV cache (arXiv 2309.06180): the memory that the block pool counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwenkit.engine.key_guard import kept_dtype
from qwenkit.errors import UsageError
from qwenkit.kernels import kv_int4

DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int8, torch.uint8),
)
# int4 by the dtype of the bytes that hold two numbers each.
NAMED_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "int4": torch.uint8,
}
KV_DTYPES = ("auto", *NAMED_DTYPES)


class KVCache:
    """Keys and values of every layer, in blocks.

    `keys[layer]` and `values[layer]` are [num_blocks, block_tokens, kv_heads, head_dim] of `dtype`;
    keys are kept rotated. With int8 `key_scales[layer]` and `value_scales[layer]` are [num_blocks,
    block_tokens, kv_heads] fp32, one for each token and head; otherwise None. With uint8, four bits
    a number, the last dimension is the bytes of `kernels.kv_int4`. All is on `device`, or each
    layer's on its own of `layer_devices`. The memory is not initialised: on a CPU a page costs
    nothing until it is written.

    `guards[layer]`, None or [kv_heads, head_dim / 2] fp32, is what keys are divided by when they
    are written, and queries are multiplied by; see `engine.key_guard`, which also says what dtype
    a layer is kept in then.

    Raises UsageError for another dtype, or when the machine refuses that much memory.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_tokens: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        layer_devices: Sequence[torch.device] | None = None,
        guards: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise UsageError(
                f"A KV cache of {dtype} was asked for; it can be {', '.join(map(str, DTYPES))}."
            )
        self.block_tokens = block_tokens
        self._num_blocks = num_blocks
        places = [device] * num_layers if layer_devices is None else layer_devices
        given = [None] * num_layers if guards is None else guards
        self.guards = [g if g is None else g.to(p) for g, p in zip(given, places, strict=True)]
        self.dtypes = [kept_dtype(dtype, guard) for guard in self.guards]
        shape = num_blocks, block_tokens, kv_heads
        kinds = list(zip(self.dtypes, places, strict=True))
        try:
            self.keys, self.values = (
                [
                    torch.empty((*shape, _width(kept, head_dim)), dtype=kept, device=place)
                    for kept, place in kinds
                ]
                for _ in ("keys", "values")
            )
            self.key_scales, self.value_scales = (
                [
                    torch.empty(shape, device=place, dtype=torch.float32)
                    if kept is torch.int8
                    else None
                    for kept, place in kinds
                ]
                for _ in ("keys", "values")
            )
        except (RuntimeError, TypeError) as error:  # TypeError: beyond 64 bits
            heads = sum(_head_bytes(kept, head_dim) for kept in self.dtypes)
            tokens = num_blocks * block_tokens
            names = ", ".join(sorted({str(place) for place in places}))
            raise UsageError(
                f"kv_cache_tokens: keys and values of {tokens:,} tokens, as many as were asked for "
                f"or as the model allows, need {tokens * 2 * kv_heads * heads / 1e9:,.1f} GB, "
                f"which {names} does not give. Set a smaller limit with context_tokens=N "
                "(--context N)."
            ) from error

    @property
    def size_bytes(self) -> int:
        """Bytes of address space; on a CPU resident only where written."""
        parts = (*self.keys, *self.values, *self.key_scales, *self.value_scales)
        return sum(tensor.nbytes for tensor in parts if tensor is not None)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.size_bytes // (self._num_blocks * self.block_tokens)


def _width(dtype: torch.dtype, head_dim: int) -> int:
    return kv_int4.row_bytes(head_dim) if dtype is torch.uint8 else head_dim


def _head_bytes(dtype: torch.dtype, head_dim: int) -> int:
    """Bytes of one head of one token's keys or values."""
    return _width(dtype, head_dim) * dtype.itemsize + (4 if dtype is torch.int8 else 0)
