"""The sizes and choices of one engine."""

from __future__ import annotations

from dataclasses import dataclass

from qwenkit.engine.kv import KV_DTYPES
from qwenkit.errors import UsageError, suggest

SPECULATIONS = ("none", "prompt-lookup")
_COUNTS = (
    "block_tokens",
    "kv_cache_tokens",
    "max_batch_tokens",
    "max_mixed_tokens",
    "max_sequences",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Sizes of one engine.

    `block_tokens` is the number of tokens in one block of the KV cache, `kv_cache_tokens` the size
    of the whole cache, rounded up to whole blocks (None: one sequence of the full context, or many
    shorter ones).
    `max_batch_tokens` bounds the tokens computed in one step, so a longer prompt is computed in
    chunks of that size; `max_mixed_tokens` bounds them in steps in which somebody decodes and would
    wait for a neighbour's prompt. `max_sequences` bounds the requests that run at the same time.
    `speculation` "prompt-lookup" checks several guessed tokens in one step; the output is the same.
    `prefix_cache` False computes everything anew, whatever other requests began with.
    `kv_dtype` "fp32", "bf16", "int8" or "int4" is what keys and values are kept in; "auto" is what
    the model computes in. `reference_ops` runs every op's torch reference, whatever backends are
    registered.

    Raises UsageError naming the setting on construction.
    """

    block_tokens: int = 16
    kv_cache_tokens: int | None = None
    max_batch_tokens: int = 512
    max_mixed_tokens: int = 128
    max_sequences: int = 64
    prefix_cache: bool = True
    speculation: str = "none"
    kv_dtype: str = "auto"
    reference_ops: bool = False

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is None and name == "kv_cache_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name}: expected a whole number of at least 1, got {value!r}.")
        for name in ("prefix_cache", "reference_ops"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name}: expected true or false, got {getattr(self, name)!r}.")
        if self.speculation not in SPECULATIONS:
            raise UsageError(
                f"speculation: got {self.speculation!r}. {suggest(self.speculation, SPECULATIONS)}"
            )
        if self.kv_dtype not in KV_DTYPES:
            raise UsageError(
                f"kv_dtype: got {self.kv_dtype!r}. {suggest(self.kv_dtype, KV_DTYPES)}"
            )
        if self.max_sequences > self.max_batch_tokens:
            raise UsageError(
                f"max_sequences: {self.max_sequences} is above max_batch_tokens "
                f"{self.max_batch_tokens}; every running sequence needs a token in each step."
            )

    def num_blocks(self, context_tokens: int) -> int:
        """Blocks of the cache, for a model whose sequences have at most `context_tokens`."""
        tokens = context_tokens if self.kv_cache_tokens is None else self.kv_cache_tokens
        return -(-tokens // self.block_tokens)
