"""One decoder layer quantized: what passes through it is gathered, part by part, and every matrix
gets its numbers by the method that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from qwenkit.errors import NonFiniteError
from qwenkit.formats.awq import AwqWeight
from qwenkit.formats.bnb4 import BLOCK_SIZE, Bnb4Weight
from qwenkit.formats.gptq import GptqWeight
from qwenkit.formats.llm_int8 import LlmInt8Weight
from qwenkit.formats.stacked import StackedWeight
from qwenkit.layers.attention import PackedCausal
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.weight import QuantWeight
from qwenkit.quantize.anatomy import Feed, Matrix, Part, capture, published_paths
from qwenkit.quantize.awq import search_scales
from qwenkit.quantize.gptq import gptq
from qwenkit.quantize.grid import Grid, Rounded, round_to_nearest
from qwenkit.quantize.hessian import FeedSums, Hessian
from qwenkit.quantize.ranges import round_clipped
from qwenkit.quantize.settings import QuantizeSettings, Target

_ERROR_ROWS = 512  # of a matrix, equally spaced: more would tell the same error more slowly

Flow = Callable[[], Iterator[tuple[torch.Tensor, PackedCausal]]]
Keep = Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class MatrixResult:
    """What became of one matrix of `columns`, by its published path: `group_size` of them share a
    scale. `error` is the root mean square of what its outputs are off by, relative to theirs, on
    what was calibrated on; without that, of its numbers. `note` is what the user should know of it.
    """

    path: str
    bits: int
    group_size: int
    columns: int
    error: float
    note: str | None = None


@dataclass(slots=True)
class LayerQuantizer:
    """Gives the matrices of layers their numbers.

    `path` is the layer's; `targets` say what each matrix becomes (None: nothing else), by its path
    below the layer; `told` is called with every result; `dtype` is that of the parent's files.
    """

    path: str
    settings: QuantizeSettings
    targets: Mapping[str, Target | None]
    told: Callable[[MatrixResult], None]
    dtype: torch.dtype = torch.float32
    _made: dict[str, list[QuantWeight]] = field(default_factory=dict)

    def part(self, part: Part, flow: Flow, keep: Keep | None = None) -> None:
        """Quantize a part. `flow` yields what comes into it, batch by batch, as often as it is
        asked; the part computes with its new numbers from then on. `keep` gets what the part's
        `last` matrix then reads, batch by batch, if the method looks at data.
        """
        method = self.settings.method
        if method == "gptq":
            for stage in part.stages:  # true sequential: the second sees what the first became
                sums = self._gather(part, stage, flow, keep)
                for feed in stage:
                    self._feed(feed, sums.pop(id(feed)))
        elif method == "awq":
            sums = self._gather(part, tuple(part.feeds()), flow)
            self._fold(part, sums)
            for feed in part.stages[0]:
                self._feed(feed, sums.pop(id(feed)))
            sums = self._gather(part, part.stages[1], flow, keep)  # of what the first became
            for feed in part.stages[1]:
                self._feed(feed, sums.pop(id(feed)))
        else:
            for feed in part.feeds():
                if method == "rtn":
                    self._feed(feed, None)
                else:
                    self._as_bitsandbytes(feed)

    def finish(self, layer: nn.Module) -> None:
        """Put what was made into the layer, in the place of the numbers it computed with."""
        for path, made in self._made.items():
            module = layer.get_submodule(path)
            del module.weight
            module.weight = StackedWeight(made) if len(made) > 1 else made[0]

    def _gather(
        self, part: Part, feeds: Sequence[Feed], flow: Flow, keep: Keep | None = None
    ) -> dict[int, FeedSums]:
        """The sums of what passes into each feed."""
        sums = {
            id(feed): FeedSums(feed.first.in_features, _count(feed.first), alike=not feed.source)
            for feed in feeds
        }
        takers: list[tuple[Feed, Callable[..., None]]] = [
            (feed, sums[id(feed)].take) for feed in feeds
        ]
        if keep is not None and feeds[0].first is part.last:
            takers.append((feeds[0], keep))
        for x, context in flow():
            capture(part, x, context, takers)
        return sums

    def _fold(self, part: Part, sums: Mapping[int, FeedSums]) -> None:
        """Make channels larger where that helps, and what feeds them smaller by as much."""
        first, second = part.stages
        readers = {path: m for feed in first for path, m in feed.matrices.items()}
        target = next((t for path in readers if (t := self.targets[path])), None)
        total = Hessian(len(part.norm.weight))
        for feed in first:
            total.merge(sums[id(feed)].all())
        if target is not None and total.tokens:
            scales = self._scales([_numbers(m) for m in readers.values()], total, target)
            # The norm is kept in few bits: what it can say is what the matrices are made up for.
            norm = part.norm.weight.data
            divided = (norm / scales).to(torch.bfloat16).float()
            untouched = (scales == 1) | (divided == 0)
            divided = torch.where(untouched, norm, divided)
            scales = torch.where(untouched, 1.0, norm / divided)
            norm.copy_(divided)
            for matrix in (*readers.values(), *part.routers.values()):
                _numbers(matrix).mul_(scales)
            for feed in first:
                sums[id(feed)].scale_inputs(scales)
        for feed in second:
            source = None if feed.source is None else readers[feed.source]
            self._fold_back(feed, source, sums[id(feed)])

    def _fold_back(self, feed: Feed, source: Matrix | None, sums: FeedSums) -> None:
        """The same of a matrix fed by another one, whose rows become smaller."""
        [(path, matrix)] = feed.matrices.items()
        target, columns = self.targets[path], matrix.in_features
        if source is None or source.out_features != columns or target is None:
            return  # where several heads share a channel of values there is no one source
        for number, hessian in enumerate(sums.each):
            if hessian.tokens:
                own = _of_expert(matrix, number)
                scales = self._scales([own], hessian, target)
                own.mul_(scales)
                hessian.scale_inputs(scales)
                _of_expert(source, number).div_(scales[:, None])
                bias = getattr(source, "bias", None)
                if bias is not None:
                    bias.data.div_(scales)

    def _scales(
        self, weights: Sequence[torch.Tensor], hessian: Hessian, target: Target
    ) -> torch.Tensor:
        grid = self._grid(target)
        return search_scales(weights, hessian.mean_absolute, hessian.matrix(), grid)

    def _grid(self, target: Target) -> Grid:
        return Grid(target.bits, target.group_size, self.settings.is_symmetric)

    def _feed(self, feed: Feed, sums: FeedSums | None) -> None:
        """Round the matrices of a feed: those that become alike by GPTQ, in one go."""
        for number in range(_count(feed.first)):
            hessian, note = (None, None) if sums is None else sums.matrix(number)
            alike: dict[object, list[str]] = {}
            for path in feed.matrices:
                target = self.targets[path]
                key = target if self.settings.method == "gptq" else path
                if target is not None:
                    alike.setdefault(key, []).append(path)
            for paths in alike.values():
                self._together(feed, paths, number, hessian, note)

    def _together(
        self,
        feed: Feed,
        paths: Sequence[str],
        number: int,
        hessian: torch.Tensor | None,
        note: str | None,
    ) -> None:
        target = self.targets[paths[0]]
        assert target is not None
        views = [_of_expert(feed.matrices[path], number) for path in paths]
        names = [published_paths(path, feed.matrices[path])[number] for path in paths]
        try:
            rounded, more = self._round(torch.cat(views), hessian, target)
        except NonFiniteError as error:
            raise NonFiniteError(f"{self.path}.{names[0]}: {error}") from error
        start = 0
        for path, name, view in zip(paths, names, views, strict=True):
            own = rounded.rows(start, start + len(view))
            start += len(view)
            remark = "; ".join(each for each in (note, more) if each) or None
            size = view.shape[1] if target.group_size == -1 else target.group_size
            self._put(path, view, self._kept(own), hessian, (name, target.bits, size, remark))

    def _as_bitsandbytes(self, feed: Feed) -> None:
        """NF4 and LLM.int8, of the numbers as they are stored: no data is needed."""
        for path, matrix in feed.matrices.items():
            for number in range(_count(matrix) if self.targets[path] else 0):
                view = _of_expert(matrix, number)
                name = published_paths(path, matrix)[number]
                try:
                    if self.settings.method == "nf4":
                        made: QuantWeight = Bnb4Weight.quantize(view.to(self.dtype), "nf4")
                    else:
                        made = LlmInt8Weight.quantize(view)
                except NonFiniteError as error:
                    raise NonFiniteError(f"{self.path}.{name}: {error}") from error
                is_nf4 = self.settings.method == "nf4"
                size = BLOCK_SIZE if is_nf4 else view.shape[1]
                self._put(path, view, made, None, (name, 4 if is_nf4 else 8, size, None))

    def _put(
        self,
        path: str,
        view: torch.Tensor,
        made: QuantWeight,
        hessian: torch.Tensor | None,
        facts: tuple[str, int, int, str | None],
    ) -> None:
        """Keep what was made of a matrix, and compute with it from now on."""
        numbers = made.dequantize(torch.float32)
        off_by = output_error(view, numbers, hessian)
        view.copy_(numbers)
        self._made.setdefault(path, []).append(made)
        name, bits, size, remark = facts
        columns = view.shape[1]
        self.told(MatrixResult(f"{self.path}.{name}", bits, size, columns, off_by, remark))

    def _round(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor | None,
        target: Target,
    ) -> tuple[Rounded, str | None]:
        settings, grid = self.settings, self._grid(target)
        if hessian is None:
            return round_to_nearest(weight, grid), None
        if settings.method == "awq":
            return round_clipped(weight, hessian, grid), None
        order, damp = settings.act_order, settings.damp
        found = gptq(weight, hessian, grid, act_order=order, damp=damp)
        return found.rounded, f"damped by {found.damp:g}" if found.damp > damp else None

    def _kept(self, rounded: Rounded) -> QuantWeight:
        if self.settings.is_awq_layout:
            return AwqWeight.from_integers(rounded.numbers, rounded.scales, rounded.zero_points)
        return GptqWeight.from_integers(
            rounded.numbers,
            rounded.scales,
            rounded.zero_points,
            rounded.groups,
            bits=rounded.bits,
            is_v2=self.settings.is_v2,
        )


def output_error(weight: torch.Tensor, other: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """How far the outputs of `other` lie from those of `weight`, both fp32 [rows, columns]: root
    mean square relative to the outputs', for inputs of which `hessian` is the sum of x xᵀ; of the
    numbers themselves without one.
    """
    step = max(1, len(weight) // _ERROR_ROWS)
    exact, off = weight[::step], (other - weight)[::step]
    seen_off, seen = (off, exact) if hessian is None else (off @ hessian, exact @ hessian)
    total = float((seen * exact).sum())
    return (max(float((seen_off * off).sum()), 0.0) / total) ** 0.5 if total > 0 else 0.0


def _count(matrix: Matrix) -> int:
    return matrix.groups if isinstance(matrix, GroupedLinear) else 1


def _numbers(matrix: Matrix) -> torch.Tensor:
    """The numbers that it computes with, which may be changed in place: fp32 [rows, columns]."""
    assert isinstance(matrix.weight, nn.Parameter)
    return matrix.weight.data


def _of_expert(matrix: Matrix, number: int) -> torch.Tensor:
    """Those of one expert, or of the only matrix that there is: a view."""
    rows = matrix.out_features
    return _numbers(matrix)[number * rows : (number + 1) * rows]
