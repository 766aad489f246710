"""A decoder layer as what a quantizer sees of it: matrices, and what feeds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from qwenkit.layers.attention import AttentionContext
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.linear import Linear
from qwenkit.layers.moe import SparseMoe
from qwenkit.layers.norm import RMSNorm
from qwenkit.models.spec import Anatomy

Matrix = Linear | GroupedLinear
ROUTERS = ("gate", "shared_expert_gate")  # of a mixture: small, and a wrong expert costs most
_SWIGLU = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Feed:
    """Matrices that read the same inputs, by their paths below the layer.

    `source` is the path of the matrix whose outputs, multiplied by something or mixed among tokens,
    their inputs are; None where the part's norm makes them, or where no one matrix is known.
    """

    matrices: dict[str, Matrix]
    source: str | None = None

    @property
    def first(self) -> Matrix:
        """One of them; where they are experts, all are."""
        return next(iter(self.matrices.values()))


@dataclass(frozen=True, slots=True)
class Part:
    """Half of a layer: x + module(norm(x)).

    The two `stages` are feeds in the order in which they run; those of the first, and the
    `routers`, which are never quantized, read what the norm makes.
    """

    path: str
    module: nn.Module
    norm_path: str
    norm: RMSNorm
    stages: tuple[tuple[Feed, ...], tuple[Feed, ...]]
    routers: dict[str, Linear]
    takes_context: bool

    def run(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """x [tokens, hidden_size] to the same shape."""
        given = (context,) if self.takes_context else ()
        y: torch.Tensor = self.module(x, *given, residual=x, norm=self.norm)
        return y

    @property
    def last(self) -> Linear | None:
        """The matrix whose outputs, added to x, are all that leaves the part; None of a mixture."""
        feeds = self.stages[1]
        only = feeds[0].first if len(feeds) == 1 else None
        return only if isinstance(only, Linear) else None

    def feeds(self) -> Iterator[Feed]:
        """All of its feeds."""
        for stage in self.stages:
            yield from stage


@dataclass(slots=True)
class _Seen(Exception):
    """Everything that was waited for has come: the rest of the part need not run."""

    left: int = field(default=0)


def layer_parts(layer: nn.Module, anatomy: Anatomy) -> tuple[Part, Part]:
    """The attention and the feed-forward part of a decoder layer."""
    attention, mlp = (layer.get_submodule(name) for name in (anatomy.attention, anatomy.mlp))
    first = cast(RMSNorm, layer.get_submodule(anatomy.attention_norm))
    second = cast(RMSNorm, layer.get_submodule(anatomy.mlp_norm))
    inputs = _matrices(attention, anatomy.attention, anatomy.attention_inputs)
    output = _matrices(attention, anatomy.attention, (anatomy.attention_output,))
    last = list(inputs)[-1] if len(inputs) > 1 else None  # values; not where all are one matrix
    return (
        Part(
            path=anatomy.attention,
            module=attention,
            norm_path=anatomy.attention_norm,
            norm=first,
            stages=((Feed(inputs),), (Feed(output, source=last),)),
            routers={},
            takes_context=True,
        ),
        Part(
            path=anatomy.mlp,
            module=mlp,
            norm_path=anatomy.mlp_norm,
            norm=second,
            stages=_mlp_stages(mlp, anatomy),
            routers=_routers(mlp, anatomy),
            takes_context=False,
        ),
    )


def _mlp_stages(mlp: nn.Module, anatomy: Anatomy) -> tuple[tuple[Feed, ...], tuple[Feed, ...]]:
    names = [(anatomy.mlp, mlp, (anatomy.gate, anatomy.up, anatomy.down))]
    if isinstance(mlp, SparseMoe):
        names = [(f"{anatomy.mlp}.experts", mlp.experts, _SWIGLU)]
        if mlp.has_shared_expert:
            names.append((f"{anatomy.mlp}.shared_expert", mlp.shared_expert, _SWIGLU))
    first = tuple(Feed(_matrices(m, path, own[:2])) for path, m, own in names)
    second = tuple(
        Feed(_matrices(m, path, own[2:]), source=f"{path}.{own[1]}") for path, m, own in names
    )
    return first, second


def _routers(mlp: nn.Module, anatomy: Anatomy) -> dict[str, Linear]:
    if not isinstance(mlp, SparseMoe):
        return {}
    found = ((name, getattr(mlp, name, None)) for name in ROUTERS)
    return {f"{anatomy.mlp}.{n}": m for n, m in found if isinstance(m, Linear)}


def _matrices(module: nn.Module, path: str, names: Sequence[str]) -> dict[str, Matrix]:
    return {f"{path}.{n}": cast(Matrix, module.get_submodule(n)) for n in names}


def capture(
    part: Part,
    x: torch.Tensor,
    context: AttentionContext,
    takers: Sequence[tuple[Feed, Callable[..., None]]],
) -> None:
    """Run a part until every feed's inputs have been handed to its taker.

    A taker gets x [rows, columns], and of experts also `ends`, as `GroupedLinear.forward` does.
    """
    seen = _Seen(len(takers))

    def hook(take: Callable[..., None]) -> Any:
        def before(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            grouped = isinstance(module, GroupedLinear)
            take(*given[: 2 if grouped else 1])
            seen.left -= 1
            if not seen.left:
                raise seen

        return before

    with ExitStack() as stack:
        for feed, take in takers:
            handle = feed.first.register_forward_pre_hook(hook(take))
            stack.callback(handle.remove)
        try:
            part.run(x, context)
        except _Seen:
            seen.__traceback__ = None  # it holds on to all that was computed, and to itself


def matrices(parts: Sequence[Part]) -> Iterator[tuple[str, Matrix, Feed]]:
    """Every matrix with its path below the layer and what feeds it."""
    for part in parts:
        for feed in part.feeds():
            for path, matrix in feed.matrices.items():
                yield path, matrix, feed


def published_paths(path: str, matrix: Matrix) -> list[str]:
    """The paths that a matrix, or each expert of it, has in published files."""
    return list(matrix.published_paths(path)) if isinstance(matrix, GroupedLinear) else [path]
