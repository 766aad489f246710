"""Checkpoints cut into several files: the index says which tensor lies in which file.

The index is `{"metadata": {…}, "weight_map": {tensor name: file name}}`, the same for safetensors
and for PyTorch's own files. It must agree with the files in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from qwenkit.checkpoint.members import clip, member, read_json
from qwenkit.checkpoint.spec import StoredTensor
from qwenkit.errors import CheckpointError

ReadFile = Callable[[Path], Mapping[str, StoredTensor]]


def read_sharded(index: Path, read_file: ReadFile) -> dict[str, StoredTensor]:
    """All tensors of the files that `index` names, each file read by `read_file`.

    Raises CheckpointError for a file name that leads out of the folder, a file that is missing, or
    a tensor that the index and the files do not agree on.
    """
    weight_map = _weight_map(index)
    files: dict[str, Path] = {}
    for file_name in dict.fromkeys(weight_map.values()):
        path = member(index.parent, file_name, source=index)
        if path is None:
            raise CheckpointError(
                index, file_name, "is named in the index but missing from the folder; fetch it."
            )
        files[file_name] = path
    found: dict[str, StoredTensor] = {}
    for file_name, path in files.items():
        for name, tensor in read_file(path).items():
            if weight_map.get(name) != file_name:
                raise CheckpointError(
                    path, clip(name), f"lies in this file, but not according to {index.name}."
                )
            found[name] = tensor
    for name, file_name in weight_map.items():
        if name not in found:
            raise CheckpointError(
                files[file_name], clip(name), f"is missing, though {index.name} names this file."
            )
    return found


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index, "weight_map", "expected an object of tensor → file names.")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise CheckpointError(index, f"weight_map {clip(name)}", "expected a file name.")
    return weight_map
