"""A model quantized from beginning to end: layer by layer, in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qwenkit import __version__
from qwenkit.checkpoint.digests import model_digest
from qwenkit.checkpoint.safetensors_write import DEFAULT_SHARD_BYTES
from qwenkit.errors import UsageError
from qwenkit.layers.attention import PackedCausal
from qwenkit.models.published import published_tensors
from qwenkit.quantize.anatomy import Part, layer_parts, matrices
from qwenkit.quantize.calibrate import Rows
from qwenkit.quantize.layer import LayerQuantizer, MatrixResult
from qwenkit.quantize.settings import QuantizeSettings, Target
from qwenkit.quantize.stream import (
    Activations,
    Batch,
    KeptInputs,
    LayerSource,
    WrittenActivations,
    batches,
)
from qwenkit.quantize.work import WorkFolder
from qwenkit.quantize.write import write_result


@dataclass(frozen=True, slots=True)
class Step:
    """What is told while it goes on: the share that is done, 0 to 1, and what was just made."""

    share: float
    result: MatrixResult | None = None


def quantize(
    source: LayerSource,
    rows: Rows,
    settings: QuantizeSettings,
    out: Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    told: Callable[[Step], None] = lambda step: None,
) -> tuple[WorkFolder, list[MatrixResult]]:
    """Quantize `source` into the `result` of the work folder that is returned, beside `out`.

    What was begun before with the same model, rows and settings is gone on with. Raises UsageError
    where the method needs rows and there are none, or where the folder holds other work.
    """
    if settings.needs_calibration and not rows.calibration:
        raise UsageError(
            f"data: {settings.method} needs text to calibrate on; give some by --data."
        )
    plans = _targets(source, settings)
    plan = {
        "settings": settings.to_json(),
        "model": model_digest(source.checkpoint),
        "rows": rows.digest,
        "version": f"{__version__}, torch {torch.__version__}",
    }
    work = WorkFolder(out, plan)
    done = next(n for n in range(source.layer_count + 1) if not work.is_done(n))
    flows = _Flows(source, rows, work) if settings.needs_calibration else None
    if flows is not None and done < source.layer_count:
        flows.begin(done)
    for number in range(done, source.layer_count):
        _layer(source, settings, number, plans[number], work, flows, told)
    results = list(work.results(source.layer_count))
    write_result(
        source,
        work.tensors(source.layer_count),
        results,
        settings,
        work.result,
        shard_bytes=shard_bytes,
    )
    return work, results


def _targets(source: LayerSource, settings: QuantizeSettings) -> list[dict[str, Target | None]]:
    """What every matrix of every layer becomes, by its path below the layer.

    Raises UsageError for a rule that names no matrix, or where nothing would be quantized.
    """
    widths: list[dict[str, int]] = []
    for number in range(source.layer_count):
        path, parts = source.layer_path(number), _parts(source, source.meta_layer(number))
        widths.append({f"{path}.{name}": m.in_features for name, m, _ in matrices(parts)})
    every = {path: width for layer in widths for path, width in layer.items()}
    settings.check_rules(list(every))
    targets = settings.targets(every)
    return [
        {path.removeprefix(f"{source.layer_path(n)}."): targets[path] for path in layer}
        for n, layer in enumerate(widths)
    ]


def _parts(source: LayerSource, layer: nn.Module) -> tuple[Part, Part]:
    return layer_parts(layer, source.anatomy)


def _layer(
    source: LayerSource,
    settings: QuantizeSettings,
    number: int,
    targets: dict[str, Target | None],
    work: WorkFolder,
    flows: _Flows | None,
    told: Callable[[Step], None],
) -> None:
    layer, _ = source.layer(number)
    path, results = source.layer_path(number), list[MatrixResult]()
    count = sum(target is not None for target in targets.values())

    def tell(result: MatrixResult) -> None:
        results.append(result)
        share = number + min(len(results) / max(count, 1), 1.0)
        told(Step(share / source.layer_count, result))

    quantizer = LayerQuantizer(path, settings, targets, tell, source.stored_dtype)
    attention, mlp = _parts(source, layer)
    if flows is None:
        quantizer.part(attention, _nothing)
        quantizer.part(mlp, _nothing)
    else:
        is_last = number + 1 == source.layer_count
        flows.through(quantizer, attention, work.activations(number), work.between)
        following = None if is_last else work.activations(number + 1)
        flows.through(quantizer, mlp, work.between, following)
    quantizer.finish(layer)
    tensors = {}
    dtype = source.stored_dtype
    for named in published_tensors(layer):
        tensor = named.tensor if named.storage else named.tensor.to(dtype)
        tensors[f"{path}.{named.name}"] = tensor
    work.finish_layer(number, tensors, results)
    told(Step((number + 1) / source.layer_count))


def _nothing() -> Iterator[tuple[torch.Tensor, PackedCausal]]:
    return iter(())


class _Flows:
    """The calibration's rows on their way through the layers."""

    def __init__(self, source: LayerSource, rows: Rows, work: WorkFolder) -> None:
        self._source, self._rows, self._work = source, rows, work
        self._batches = batches([len(row) for row in rows.calibration])
        self._size = rows.tokens, source.config.hidden_size

    def begin(self, layer: int) -> None:
        """Make the first layer's inputs, unless a later one's are there."""
        file = self._work.activations(layer)
        if layer or file.exists():
            return
        written = WrittenActivations(file, *self._size)
        found = self._source.embedded(self._rows.calibration)
        for batch, x in zip(self._batches, found, strict=True):
            written.put(batch, x)
        written.commit()

    def through(
        self, quantizer: LayerQuantizer, part: Part, before: Path, after: Path | None
    ) -> None:
        """Quantize a part by what comes into it from the file `before`, and write what comes out of
        it into the file `after`, if it is wanted.
        """
        given = Activations(before, *self._size)

        def flow() -> Iterator[tuple[torch.Tensor, PackedCausal]]:
            for batch in self._batches:
                yield given.rows(batch), self._context(batch)

        last, kept = part.last, None
        if after is not None and last is not None:  # what comes before it is not computed again
            kept = KeptInputs(self._work.inputs, self._batches, last.in_features)
        quantizer.part(part, flow, None if kept is None else kept.append)
        if after is None:
            return
        written = WrittenActivations(after, *self._size)
        for batch in self._batches:
            x = given.rows(batch)
            if kept is None or last is None:
                y = part.run(x, self._context(batch))
            else:
                y = last(kept.rows(batch), x)
            written.put(batch, y)
        written.commit()

    def _context(self, batch: Batch) -> PackedCausal:
        return self._source.context(batch.lengths)
