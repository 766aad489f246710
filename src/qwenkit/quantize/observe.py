"""A part of a layer watched while it runs: what its matrices read, and how much they give."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from qwenkit.layers.attention import AttentionContext
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.quantize.anatomy import Feed, Part

Take = Callable[[Feed, torch.Tensor, torch.Tensor | None], None]


class Watch:
    """Runs a part. `largest` is the largest magnitude of every matrix's outputs, by its path below
    the layer, and of what leaves the part, under the part's own path.
    """

    def __init__(self, part: Part) -> None:
        self._part = part
        self.largest: dict[str, float] = {}

    def run(self, x: torch.Tensor, context: AttentionContext, take: Take) -> torch.Tensor:
        """x [tokens, hidden_size] to the same shape. `take` gets every feed with what it reads,
        [rows, columns], and of experts their `ends`.
        """
        part = self._part
        with ExitStack() as stack:
            for feed in part.feeds():
                handle = feed.first.register_forward_pre_hook(_inputs(feed, take))
                stack.callback(handle.remove)
                for path, matrix in feed.matrices.items():
                    handle = matrix.register_forward_hook(self._outputs(path))
                    stack.callback(handle.remove)
            y = part.run(x, context)
        self._note(part.path, y)
        return y

    def _outputs(self, path: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def after(module: nn.Module, given: Any, y: torch.Tensor) -> None:
            self._note(path, y)

        return after

    def _note(self, path: str, y: torch.Tensor) -> None:
        if y.numel():
            self.largest[path] = max(self.largest.get(path, 0.0), float(y.abs().max()))


def _inputs(feed: Feed, take: Take) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def before(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        take(feed, given[0], given[1] if isinstance(module, GroupedLinear) else None)

    return before
