"""The folder in which a model is quantized: a layer that is done is never done again.

Every file is whole or not there, and a layer's file comes last, after what the next layer starts
from; so work that ends at any moment goes on from the last whole layer, to the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qwenkit.checkpoint.atomic import replacing
from qwenkit.checkpoint.safetensors import read_safetensors
from qwenkit.checkpoint.safetensors_write import write_safetensors
from qwenkit.checkpoint.spec import StoredTensor
from qwenkit.errors import CheckpointError, UsageError
from qwenkit.quantize.layer import MatrixResult

_PLAN = "plan.json"
_RESULT = "result"


class WorkFolder:
    """The folder beside the result, named after it."""

    def __init__(self, out: Path, plan: Mapping[str, Any]) -> None:
        """Open or make it. Raises UsageError where it belongs to other work, or where `out` is
        taken.
        """
        self.out, self.path = out, out.with_name(f"{out.name}.partial")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out}: is there already; give another name, or move it away.")
        plan = json.loads(json.dumps(plan))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.path / _PLAN
            found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        except (OSError, ValueError) as error:
            raise CheckpointError(self.path, "folder", f"cannot be used: {error}.") from error
        if found is None:
            with replacing(file) as written:
                written.write(json.dumps(plan, indent=1, ensure_ascii=False).encode())
        else:
            _check_same(self.path, found, plan)

    @property
    def result(self) -> Path:
        """Where the model is put together before it gets its name."""
        return self.path / _RESULT

    def activations(self, layer: int) -> Path:
        """The file of what comes into a layer."""
        return self.path / f"activations-{layer:04d}.bf16"

    @property
    def between(self) -> Path:
        """The file of what comes into the feed-forward part of the layer in work."""
        return self.path / "between.bf16"

    @property
    def inputs(self) -> Path:
        """The file of what the last matrix of the part in work reads."""
        return self.path / "inputs.bf16"

    def is_done(self, layer: int) -> bool:
        """Whether a layer's numbers are there."""
        return self._layer(layer).is_file()

    def finish_layer(
        self, layer: int, tensors: Mapping[str, torch.Tensor], results: Sequence[MatrixResult]
    ) -> None:
        """Write what became of a layer; what it was made from is not needed any more."""
        with replacing(self._results(layer)) as written:
            written.write(json.dumps([dataclasses.asdict(r) for r in results]).encode())
        write_safetensors(self._layer(layer), tensors)
        for file in (self.activations(layer), self.between, self.inputs):
            file.unlink(missing_ok=True)

    def tensors(self, layers: int) -> dict[str, StoredTensor]:
        """The tensors of all layers, by their published names."""
        found: dict[str, StoredTensor] = {}
        for layer in range(layers):
            found |= read_safetensors(self._layer(layer))
        return found

    def results(self, layers: int) -> Iterator[MatrixResult]:
        """What became of every matrix."""
        for layer in range(layers):
            for item in json.loads(self._results(layer).read_text(encoding="utf-8")):
                yield MatrixResult(**item)

    def publish(self) -> None:
        """Give the result its name, and clear away what it was made with."""
        if self.out.exists():
            self.out.rmdir()  # empty, as was seen at the beginning
        self.result.replace(self.out)
        shutil.rmtree(self.path)

    def _layer(self, layer: int) -> Path:
        return self.path / f"layer-{layer:04d}.safetensors"

    def _results(self, layer: int) -> Path:
        return self.path / f"layer-{layer:04d}.json"


def _check_same(folder: Path, found: Any, plan: Mapping[str, Any]) -> None:
    differ = [k for k, v in plan.items() if not isinstance(found, dict) or found.get(k) != v]
    if differ:
        raise UsageError(
            f"{folder}: holds work that was begun with another {' and '.join(differ)}. Go on as it "
            "was begun, or delete the folder."
        )
