"""Where a number that is none arose: asked when a request's logits are not finite, never before.

A token whose hidden state turns NaN or infinite leaves keys and values that are, and through them
every later token of its sequence is. So the cache tells the first token that went wrong, and that
token is computed once more, alone, with every module of the model watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from qwenkit.engine.kv import KVCache
from qwenkit.kernels.finite import is_finite
from qwenkit.kernels.kv_int4 import scales_and_minima


def locate(
    model: object,
    cache: KVCache,
    blocks: Sequence[int],
    position: int,
    compute: Callable[[int], object],
) -> str:
    """One sentence: in which module, and at which token of the sequence, it began.

    The keys and values of tokens 0 to `position`, whose logits are not finite, are in `blocks`;
    `compute` computes the token at a position again, over what is in the cache before it. The
    sequence's own keys and values are written anew with that, nobody else's.
    """
    bad = (_first_bad(part, blocks, position) for part in _parts(cache))
    # Kernels may let a bad token of a chunk reach earlier ones of it in the next layer.
    first = next((at for at in bad if at is not None), position)
    found: list[str] = []
    if isinstance(model, nn.Module):
        with _watched(model, found):
            compute(first)
    where = f"in the output of {found[0]}" if found else "somewhere in the model"
    return f"It arose {where}, at token {first} of the sequence."


def _parts(cache: KVCache) -> Iterator[torch.Tensor]:
    """Of each layer what shows that keys and values are not finite: [num_blocks, block_tokens, …].

    Whole numbers are, always; what they are scaled by shows it.
    """
    keys = zip(cache.keys, cache.key_scales, strict=True)
    values = zip(cache.values, cache.value_scales, strict=True)
    for layer in zip(keys, values, strict=True):
        for numbers, scale in layer:
            yield numbers if scale is None else scale


def _first_bad(part: torch.Tensor, blocks: Sequence[int], position: int) -> int | None:
    """The first of the tokens up to `position` whose numbers are not all finite.

    Block by block, for a bad one is rare and a context may be long.
    """
    block_tokens = part.shape[1]
    for number in range(position // block_tokens + 1):
        tokens = part[blocks[number], : position + 1 - number * block_tokens]  # [tokens, …]
        if tokens.dtype is torch.uint8:  # four bits: the scales stand in the rows
            tokens = scales_and_minima(tokens)
        if not is_finite(tokens):
            bad = ~torch.isfinite(tokens).flatten(1).all(1)  # [tokens]
            return number * block_tokens + int(bad.nonzero()[0])
    return None


@contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Add to `found` each module that gives numbers which are not finite, as they are computed."""

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor) and not is_finite(output):
                found.append(name or "the model")

        return look

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
