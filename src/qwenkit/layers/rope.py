"""Rotary position embedding (arXiv 2104.09864) in the rotate-half layout that Qwen and Llama use,
as tables of cosines and sines.

inv_i = base^(-2i / head_dim) for i = 0 … head_dim/2 - 1, kept in fp32; a scaling changes them (see
`position`). Knows no request: what depends on a length was decided before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qwenkit.layers.position import DualChunk, Linear, Llama3, Rotary, Yarn

Tables = tuple[torch.Tensor, torch.Tensor]  # cosine and sine, each fp32 [tokens, head_dim / 2]


def inverse_frequencies(spec: Rotary, device: torch.device) -> torch.Tensor:
    """Angular steps per position, fp32 [head_dim / 2].

    A spec whose scaling depends on a length gives those of the trained length.
    """
    exponent = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device=device) / spec.head_dim
    steps = 1.0 / spec.base**exponent  # [head_dim / 2]
    match spec.scaling:
        case Linear(factor=factor):
            return steps / factor
        case Llama3() as llama3:
            return _llama3(steps, llama3)
        case Yarn() as yarn:
            return _yarn(spec, yarn, exponent)
    return steps


def attention_factor(spec: Rotary) -> float:
    """What cosines and sines are multiplied by; 1 but for YaRN."""
    yarn = spec.scaling
    if not isinstance(yarn, Yarn):
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _growth(yarn.factor, yarn.mscale) / _growth(yarn.factor, yarn.mscale_all_dim)
    return _growth(yarn.factor, 1.0)


def rotary_tables(
    specs: Rotary | Sequence[Rotary], positions: torch.Tensor, index: torch.Tensor | None = None
) -> Tables:
    """Cosine and sine for each token, two fp32 tensors [tokens, head_dim / 2].

    `positions` is [tokens], int64. With several specs `index` [tokens], int64, says whose each
    token's is; a token's rows do not depend on what else is there.
    """
    several = (specs,) if isinstance(specs, Rotary) else tuple(specs)
    device = positions.device
    steps = [inverse_frequencies(spec, device) for spec in several]
    factors = [attention_factor(spec) for spec in several]
    if len(several) == 1 or index is None:
        angles = positions.to(torch.float32)[:, None] * steps[0]  # [tokens, head_dim / 2]
        return _scaled(angles, factors[0])
    angles = positions.to(torch.float32)[:, None] * torch.stack(steps).index_select(0, index)
    if all(factor == 1 for factor in factors):
        return angles.cos(), angles.sin()
    rows = torch.tensor(factors, dtype=torch.float32, device=device)[index]  # [tokens]
    return _scaled(angles, rows[:, None])


def dual_chunk_tables(spec: DualChunk, positions: torch.Tensor) -> tuple[Tables, Tables, Tables]:
    """The tables of queries for keys of their own chunk, of the one before, and of those further
    back. The first ones are those of the keys too. `positions` is [tokens], int64.
    """
    own = positions % spec.period  # [tokens]
    following = (own + spec.period).clamp(max=spec.chunk_tokens)
    furthest = min(2 * spec.period - 1, spec.chunk_tokens)
    places = (own, following, torch.full_like(own, furthest))
    first, second, third = (rotary_tables(spec.rotary, place) for place in places)
    return first, second, third


def log_n_scale(trained_tokens: int, positions: torch.Tensor) -> torch.Tensor:
    """LogN: what queries at `positions` [tokens] are multiplied by, fp32 [tokens].

    Exactly 1 up to the trained length. Of the n-th token: log(n) to the base of that length.
    """
    count = positions.cpu().to(torch.float64) + 1  # some devices have no fp64
    scale = torch.where(count > trained_tokens, count.log() / math.log(trained_tokens), 1.0)
    return scale.to(positions.device, torch.float32)


def _scaled(angles: torch.Tensor, factor: float | torch.Tensor) -> Tables:
    if isinstance(factor, float) and factor == 1:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor


def _growth(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(steps: torch.Tensor, spec: Llama3) -> torch.Tensor:
    """Steps [head_dim / 2] slower by the factor where a turn is longer than the trained length over
    the low factor, as they are where it is shorter than over the high one, between them in between.
    """
    turns = spec.trained_tokens * steps / (2 * math.pi)  # within the trained length
    low, high = spec.low_frequency_factor, spec.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # [head_dim / 2]
    return (1 - kept) * steps / spec.factor + kept * steps


def _yarn(spec: Rotary, yarn: Yarn, exponent: torch.Tensor) -> torch.Tensor:
    def dimension(turns: float) -> float:
        """Where a rotation makes so many turns within the trained length."""
        length = math.log(yarn.trained_tokens / (turns * 2 * math.pi))
        return spec.head_dim * length / (2 * math.log(spec.base))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.head_dim - 1)
    if low == high:
        high += 0.001
    index = torch.arange(exponent.shape[0], dtype=torch.float32, device=exponent.device)
    kept = 1 - ((index - low) / (high - low)).clamp(0, 1)  # [head_dim / 2]
    turn = spec.base**exponent  # [head_dim / 2]
    return 1.0 / (yarn.factor * turn) * (1 - kept) + 1.0 / turn * kept
