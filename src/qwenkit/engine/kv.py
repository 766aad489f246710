"""The paged KV cache (arXiv 2309.06180): the memory that the block pool counts."""

from __future__ import annotations

import torch

from qwenkit.errors import UsageError


class KVCache:
    """Keys and values of every layer, in blocks.

    `keys[layer]` and `values[layer]` are [num_blocks, block_tokens, kv_heads, head_dim]; keys are
    kept rotated. The memory is not initialised: on a CPU a page costs nothing until it is written.

    Raises UsageError when the machine refuses that much memory.
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
    ) -> None:
        self.block_tokens = block_tokens
        shape = (num_blocks, block_tokens, kv_heads, head_dim)
        try:
            self.keys, self.values = (
                [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
                for _ in ("keys", "values")
            )
        except RuntimeError as error:
            bytes_per_token = 2 * num_layers * kv_heads * head_dim * dtype.itemsize
            raise UsageError(
                f"kv_cache_tokens: {num_blocks * block_tokens} tokens of {bytes_per_token} bytes "
                f"do not fit the memory of {device}; ask for fewer. ({error})"
            ) from error

    @property
    def size_bytes(self) -> int:
        """Bytes of address space; on a CPU resident only where written."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))
