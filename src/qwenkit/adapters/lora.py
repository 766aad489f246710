"""One adapter at a model: a layer that trains, and the merging of its product into the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from qwenkit.adapters.peft_files import LoraAdapter, LowRank, check_fits
from qwenkit.errors import UsageError
from qwenkit.layers.linear import Embedding, Linear
from qwenkit.layers.weight import QuantWeight


class LoraLinear(nn.Module):
    """y = linear(x) + (x downᵀ) upᵀ · scaling, around a `Linear` with a plain or quantized weight.

    `down` [rank, in_features] and `up` [out_features, rank] are fp32 parameters that take
    gradients; the wrapped layer's take none. `up` starts at zero, so that at first nothing changes.
    """

    def __init__(self, linear: Linear, rank: int, scaling: float) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.scaling = scaling
        self.down = nn.Parameter(torch.empty(rank, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self._plain: nn.Parameter | None = None

    @classmethod
    def of(cls, linear: Linear, pair: LowRank) -> LoraLinear:
        """With the matrices of an adapter. Raises UsageError where it has a bias of its own."""
        if pair.up_bias is not None:
            raise UsageError("lora_bias: a bias of the adapter's own is served, but not trained.")
        made = cls(linear, pair.rank, pair.scaling)
        made.down.data.copy_(pair.down)
        made.up.data.copy_(pair.up)
        return made

    @property
    def is_merged(self) -> bool:
        """Whether the product is in the layer's own weight."""
        return self._plain is not None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in_features] to [..., out_features]; `residual`, of that shape, is added."""
        y: torch.Tensor = self.linear(x, residual)
        if self.is_merged:
            return y
        low = functional.linear(x.to(self.down.dtype), self.down)  # [..., rank]
        return y + (functional.linear(low, self.up) * self.scaling).to(y.dtype)

    def low_rank(self) -> LowRank:
        """What the parameters are now, sharing their memory."""
        return LowRank(self.down.detach(), self.up.detach(), self.scaling)

    def merge(self) -> None:
        """Put the product into the weight. Raises UsageError when it is quantized or merged."""
        weight = self.linear.weight
        if self.is_merged:
            raise UsageError("merge: the adapter is merged already.")
        if isinstance(weight, QuantWeight):
            raise _quantized("this layer", weight)
        self._plain = weight
        merged = merged_weight(weight, self.low_rank(), weight.dtype)
        self.linear.weight = nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Give the layer back the weight that it had, bit for bit."""
        if self._plain is None:
            raise UsageError("unmerge: the adapter is not merged.")
        self.linear.weight, self._plain = self._plain, None


def merged_weight(
    weight: torch.Tensor | QuantWeight, pair: LowRank, dtype: torch.dtype
) -> torch.Tensor:
    """W + up down · scaling, [out_features, in_features], added in fp32 and rounded to `dtype`."""
    numbers = weight.dequantize(torch.float32) if isinstance(weight, QuantWeight) else weight
    wide = numbers.detach().to(torch.float32)
    down, up = (m.to(device=wide.device, dtype=torch.float32) for m in (pair.down, pair.up))
    return (wide + up @ down * pair.scaling).to(dtype)


@dataclass(frozen=True, slots=True)
class Merging:
    """An adapter to be put into a model's weights. With `dequantize` a quantized weight becomes
    plain numbers on the way; without, it is refused.
    """

    adapter: LoraAdapter
    dequantize: bool = False

    def check(self, model: nn.Module, *, tied: nn.Module | None) -> None:
        """Raise CheckpointError or UsageError when it cannot be put into this model, whose head
        `tied` has the embedding's weight.
        """
        check_fits(self.adapter, model)
        changed = {model.get_submodule(path) for path in self.adapter.low_ranks}
        whole = {model.get_submodule(path) for path in self.adapter.weights}
        if tied is not None and (tied in changed or tied in whole):
            raise UsageError(
                f"{self.adapter.file}: changes the head, which is the embedding in this model "
                "(tie_word_embeddings), and so cannot be merged."
            )

    def into(self, path: str, module: nn.Module, dtype: torch.dtype) -> None:
        """Put what the adapter has for the module at `path`, if anything, into its weight and bias.

        Plain weights keep their dtype; quantized ones become numbers in `dtype`. Raises UsageError.
        """
        if not isinstance(module, Linear | Embedding):
            return
        pair, whole = self.adapter.low_ranks.get(path), self.adapter.weights.get(path)
        weight = module.weight
        if pair is not None or whole is not None:
            if isinstance(weight, QuantWeight):
                if not self.dequantize:
                    raise _quantized(path, weight)
                place = next(weight.buffers()).device
                del module.weight
            else:
                place, dtype = weight.device, weight.dtype
            base = weight if whole is None else whole.to(place)
            if pair is not None:
                base = merged_weight(base, pair, dtype)
            assert isinstance(base, torch.Tensor)
            module.weight = _frozen(base.to(dtype))
        bias = added_bias(self.adapter, path, module) if isinstance(module, Linear) else None
        if isinstance(module, Linear) and bias is not None:
            own = module.bias
            new = bias.to(dtype) if own is None else (own.float() + bias).to(own.dtype)
            module.bias = _frozen(new)


def added_bias(adapter: LoraAdapter, path: str, linear: Linear) -> torch.Tensor | None:
    """What an adapter adds to the layer's own bias, fp32 [out_features]; None: nothing."""
    pair, own = adapter.low_ranks.get(path), linear.bias
    parts = []
    if path in adapter.biases and own is not None:
        parts.append(adapter.biases[path].float().to(own.device) - own.detach().float())
    if pair is not None and pair.up_bias is not None:
        added = pair.up_bias.float() * pair.scaling
        parts.append(added if own is None else added.to(own.device))
    return sum(parts[1:], parts[0]) if parts else None


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _quantized(where: str, weight: QuantWeight) -> UsageError:
    return UsageError(
        f"merge: the weight of {where} is quantized ({weight.storage}), and rounding it again "
        "would lose what the adapter learned. Merge into plain numbers (dequantize), or serve the "
        "adapter beside the model."
    )
