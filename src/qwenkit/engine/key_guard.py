"""What keeps narrow keys of Qwen right: some of their channels are a hundred times larger than the
others, because the bias of the projection is, and would take all the room that a row's scale gives.

Rotation mixes a channel only with the one half a head away, so a divisor for each such pair, the
same for both, can be taken out of the rotated keys and put into the rotated queries: scores stay
what they are, and all channels of a key are about equally large when they are rounded together (the
idea of arXiv 2211.10438, decided from weights alone). Divisors are powers of two, which round
nothing.

That takes the outliers' harm from the other channels, but not from themselves: few bits still say
little about a number that is large and hardly varies. Layers with strong outliers are therefore
kept in int8 where int4 is asked for, those with extreme ones in bf16 whatever is asked for.
"""

from __future__ import annotations

import torch

from qwenkit.engine.served import ServedModel

STRONG = 8.0  # a channel so many times larger than most is too much for four bits,
EXTREME = 32.0  # for eight
_MOST = 15  # powers of two


def key_guards(model: ServedModel) -> list[torch.Tensor | None]:
    """Of each layer the divisors [kv_heads, head_dim / 2] fp32 of its keys' pairs; None where
    nothing stands out, or where the model cannot say.
    """
    guards = [None if sizes is None else _guard(sizes) for sizes in model.key_sizes()]
    return [None if guard is None or bool((guard == 1).all()) else guard for guard in guards]


def _guard(sizes: torch.Tensor) -> torch.Tensor:
    """Expected magnitudes [kv_heads, head_dim] to powers of two [kv_heads, head_dim / 2]."""
    pairs = sizes.float().square().view(len(sizes), 2, -1).sum(1).sqrt()  # [kv_heads, pairs]
    typical = pairs.median(1, keepdim=True).values.clamp_min(torch.finfo(torch.float32).tiny)
    return (pairs / typical).log2().round().clamp(0, _MOST).exp2()


def kept_dtype(dtype: torch.dtype, guard: torch.Tensor | None) -> torch.dtype:
    """What a layer with these divisors is kept in where `dtype` is asked for."""
    if guard is None or dtype.is_floating_point:
        return dtype
    worst = float(guard.max())
    if worst >= EXTREME:
        return torch.bfloat16
    return torch.int8 if worst >= STRONG else dtype
