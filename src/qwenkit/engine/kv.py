"""The paged KV cache (arXiv 2309.06180): the memory that the block pool counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwenkit.errors import UsageError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)
NAMED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
KV_DTYPES = ("auto", *NAMED_DTYPES)


class KVCache:
    """Keys and values of every layer, in blocks.

    `keys[layer]` and `values[layer]` are [num_blocks, block_tokens, kv_heads, head_dim] of `dtype`;
    keys are kept rotated. With int8 `key_scales[layer]` and `value_scales[layer]` are [num_blocks,
    block_tokens, kv_heads] fp32, one for each token and head; otherwise None. All is on `device`,
    or each layer's on its own of `layer_devices`. The memory is not initialised: on a CPU a page
    costs nothing until it is written.

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
    ) -> None:
        if dtype not in DTYPES:
            raise UsageError(
                f"A KV cache of {dtype} was asked for; it can be {', '.join(map(str, DTYPES))}."
            )
        self.block_tokens = block_tokens
        shape = (num_blocks, block_tokens, kv_heads, head_dim)
        places = [device] * num_layers if layer_devices is None else layer_devices
        try:
            self.keys, self.values = (
                [torch.empty(shape, dtype=dtype, device=place) for place in places]
                for _ in ("keys", "values")
            )
            self.key_scales, self.value_scales = (
                [
                    torch.empty(shape[:3], device=place, dtype=torch.float32)
                    if dtype is torch.int8
                    else None
                    for place in places
                ]
                for _ in ("keys", "values")
            )
        except (RuntimeError, TypeError) as error:  # TypeError: beyond 64 bits
            scale_bytes = 4 if dtype is torch.int8 else 0
            bytes_per_token = 2 * num_layers * kv_heads * (head_dim * dtype.itemsize + scale_bytes)
            names = ", ".join(sorted({str(place) for place in places}))
            tokens = num_blocks * block_tokens
            raise UsageError(
                f"kv_cache_tokens: keys and values of {tokens:,} tokens, as many as were asked for "
                f"or as the model allows, need {tokens * bytes_per_token / 1e9:,.1f} GB, which "
                f"{names} does not give. Set a smaller limit with context_tokens=N (--context N)."
            ) from error

    @property
    def size_bytes(self) -> int:
        """Bytes of address space; on a CPU resident only where written."""
        parts = (*self.keys, *self.values, *self.key_scales, *self.value_scales)
        return sum(tensor.nbytes for tensor in parts if tensor is not None)
