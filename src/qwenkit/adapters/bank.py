"""Many adapters over one model, each token with its own or none, in one batch.

The model itself is never touched: beside it stands a second tree of modules that shares every
weight, in which the adapted linear layers are wrapped. A step that needs no adapter runs the model,
at its speed and with its bits. In a step that does, a row without adapter still gets the bits of
the model, and a row with one gets them plus its own product, whatever its neighbours have: on
native kernels each row's sums are taken in one order, in any batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from qwenkit.adapters.lora import added_bias
from qwenkit.adapters.peft_files import LoraAdapter, LowRank, check_fits
from qwenkit.errors import UsageError
from qwenkit.kernels.ops.add_low_rank import add_low_rank
from qwenkit.kernels.packed import interleave
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.linear import Embedding, Linear
from qwenkit.layers.weight import QuantWeight

HEAD = "lm_head"


class Segment(NamedTuple):
    """Rows from `start` to `stop` that have the adapter `key`."""

    key: int
    start: int
    stop: int


def segments(keys: Iterable[int], counts: Iterable[int]) -> tuple[Segment, ...]:
    """Rows one after another, so many of each key, as segments; key 0 is no adapter and has none.

    Neighbours of one key are one segment: no row's result depends on where a segment ends.
    """
    found: list[Segment] = []
    start = 0
    for key, count in zip(keys, counts, strict=True):
        stop = start + count
        if key and count:
            if found and found[-1].key == key and found[-1].stop == start:
                found[-1] = found[-1]._replace(stop=stop)
            else:
                found.append(Segment(key, start, stop))
        start = stop
    return tuple(found)


@dataclass(slots=True)
class _Choice:
    """The segments of the coming forward pass: of all its tokens, and of those that the head sees.

    The wrapped layers read it; one thread at a time runs the model.
    """

    tokens: Sequence[Segment] = ()
    sampled: Sequence[Segment] = ()


class AdapterBank:
    """The adapters of one model; `native` keeps them as the native kernels read them.

    `model` is the tree to call for batches with adapters, after `choose`.
    """

    def __init__(self, model: nn.Module, *, native: bool) -> None:
        self.model = _shadow(model)
        self._plain = model
        self._native = native
        self._choice = _Choice()
        self._wrapped: dict[str, AdaptedLinear] = {}

    def prepare(self, adapter: LoraAdapter) -> dict[str, Piece]:
        """The adapter as it is computed with, by module path. Any thread may ask.

        Raises CheckpointError when it does not fit the model, UsageError when it can only be
        merged.
        """
        check_fits(adapter, self._plain)
        changed = [p for p, w in adapter.weights.items() if not self._has(p, w)]
        if changed:
            names = ", ".join(changed)
            raise UsageError(
                f"{adapter.file}: replaces {names} as a whole (modules_to_save), which cannot be "
                "chosen per request. Merge the adapter into the model (qwenkit merge)."
            )
        paths = dict.fromkeys((*adapter.low_ranks, *adapter.biases))
        return {path: self._piece(adapter, path) for path in paths}

    def add(self, key: int, pieces: dict[str, Piece]) -> None:
        """Take an adapter in under a key that no other has; 0 is no key."""
        for path, piece in pieces.items():
            if path not in self._wrapped:
                self._wrapped[path] = self._wrap(path)
            self._wrapped[path].pieces[key] = piece

    def remove(self, key: int) -> None:
        """Forget an adapter, and unwrap the layers that no other has a part at."""
        for path, adapted in list(self._wrapped.items()):
            adapted.pieces.pop(key, None)
            if not adapted.pieces:
                _put(self.model, path, adapted.linear)
                del self._wrapped[path]

    def choose(self, tokens: Sequence[Segment], sampled: Sequence[Segment]) -> None:
        """Say which rows of the next forward pass have which adapter, of all its tokens and of the
        rows that the context selects.
        """
        self._choice.tokens, self._choice.sampled = tokens, sampled

    def _has(self, path: str, weight: torch.Tensor) -> bool:
        """Whether a module's weight is this one; PEFT writes a copy of a head that it adapts."""
        own = cast(Linear | Embedding, self._plain.get_submodule(path)).weight
        numbers = own.dequantize(weight.dtype) if isinstance(own, QuantWeight) else own.detach()
        return torch.equal(numbers.to(weight), weight)

    def _wrap(self, path: str) -> AdaptedLinear:
        linear = cast(Linear, self._plain.get_submodule(path))
        adapted = AdaptedLinear(linear, self._choice, of_sampled=path == HEAD)
        _put(self.model, path, adapted)
        return adapted

    def _piece(self, adapter: LoraAdapter, path: str) -> Piece:
        linear = cast(Linear, self._plain.get_submodule(path))
        weight = linear.weight
        place = next(weight.buffers() if isinstance(weight, QuantWeight) else iter((weight,)))
        bias = added_bias(adapter, path, linear)
        pair = adapter.low_ranks.get(path)
        if pair is None:  # a trained bias alone
            assert bias is not None
            down, up = torch.zeros(1, linear.in_features), torch.zeros(linear.out_features, 1)
            pair = LowRank(down, up, 1.0)
        made = NativePiece if self._native else PlainPiece
        return made(pair, bias, place.device)


class AdaptedLinear(nn.Module):
    """A linear layer to whose output rows are added what their adapters have at it."""

    def __init__(self, linear: Linear, choice: _Choice, *, of_sampled: bool) -> None:
        super().__init__()
        self.linear = linear
        self.pieces: dict[int, Piece] = {}
        self._choice = choice
        self._of_sampled = of_sampled

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, in_features] to [tokens, out_features]; `residual`, so shaped, is added."""
        y: torch.Tensor = self.linear(x, residual)
        chosen = self._choice.sampled if self._of_sampled else self._choice.tokens
        for key, start, stop in chosen:
            piece = self.pieces.get(key)
            if piece is not None:
                piece.add(y[start:stop], x[start:stop])
        return y


class NativePiece:
    """One adapter at one layer as fp32 panels, whose products have the same bits in any batch."""

    def __init__(self, pair: LowRank, bias: torch.Tensor | None, device: torch.device) -> None:
        self._rank = pair.rank
        self._down = _panels(pair.down.to(torch.float32), device)
        self._up = _panels(pair.up.to(torch.float32) * pair.scaling, device)
        self._bias = None if bias is None else bias.to(device)

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add to y [tokens, out_features] in place what x [tokens, in_features] makes."""
        add_low_rank(y, x, self._down, self._up, self._bias, self._rank)


class PlainPiece:
    """The same as plain matrices, in the dtype of the activations but no less than fp32."""

    def __init__(self, pair: LowRank, bias: torch.Tensor | None, device: torch.device) -> None:
        self._down = pair.down.to(device=device, dtype=torch.float32, copy=True)
        self._up = pair.up.to(device=device, dtype=torch.float32) * pair.scaling
        self._bias = None if bias is None else bias.to(device)

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """See `NativePiece.add`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        low = x.to(dtype) @ self._down.to(dtype).T  # [tokens, rank]
        added = low @ self._up.to(dtype).T  # [tokens, out_features]
        y.add_(added if self._bias is None else added + self._bias)


Piece = NativePiece | PlainPiece


def _panels(matrix: torch.Tensor, device: torch.device) -> torch.Tensor:
    return interleave(matrix.contiguous().view(torch.uint8)).to(device)


def _shadow(module: nn.Module) -> nn.Module:
    """A tree of modules of its own over the same layers, weights and settings."""
    if isinstance(module, Linear | Embedding | GroupedLinear | QuantWeight):
        return module
    if not module._modules:
        return module
    twin = copy.copy(module)
    children: dict[str, Any] = {
        name: None if child is None else _shadow(child) for name, child in module._modules.items()
    }
    twin.__dict__["_modules"] = children
    return twin


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module
