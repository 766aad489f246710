"""Writing of safetensors files, single or sharded, each file atomically.

Tensors are laid out widest dtype first, so that every one starts at a multiple of its own item
size. They are written one after another straight from their memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from qwenkit.checkpoint.atomic import replacing
from qwenkit.checkpoint.storages import TAGS
from qwenkit.errors import UsageError

DEFAULT_SHARD_BYTES = 5_000_000_000


def write_safetensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> list[Path]:
    """Write `tensors` to the file `path` ("….safetensors") and return the files written.

    When they need over `shard_bytes` bytes of data they go to `…-00001-of-0000N.safetensors` beside
    it and `….safetensors.index.json`. Each file is replaced as a whole, the index last; a folder
    that must change as one is written under another name and renamed by the caller. A tensor larger
    than `shard_bytes` has a file of its own. `tensors` may make its values on access: each is asked
    for twice and not kept.

    Raises UsageError for a name or dtype that the format has no place for, CheckpointError when the
    disk refuses.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"path: got {str(path)!r}; the name must end in '.safetensors'.")
    if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise UsageError(f"shard_bytes: got {shard_bytes!r}; expected a number of at least 1.")
    notes = {"format": "pt"} if metadata is None else dict(metadata)
    if not all(isinstance(text, str) for pair in notes.items() for text in pair):
        raise UsageError(f"metadata: got {notes!r}; both sides must be text.")
    infos = [_Info(name, tensor) for name, tensor in tensors.items()]
    shards = _split(infos, shard_bytes)
    if len(shards) == 1:
        _write_file(path, shards[0], tensors, notes)
        return [path]
    weight_map: dict[str, str] = {}
    files = []
    for number, shard in enumerate(shards, 1):
        file = path.with_name(f"{path.stem}-{number:05d}-of-{len(shards):05d}.safetensors")
        _write_file(file, shard, tensors, notes)
        weight_map |= {info.name: file.name for info in shard}
        files.append(file)
    index = path.with_name(f"{path.name}.index.json")
    total = {"total_size": sum(info.size_bytes for info in infos)}
    text = json.dumps({"metadata": total, "weight_map": weight_map}, indent=2, sort_keys=True)
    with replacing(index) as output:
        output.write(text.encode())
    path.unlink(missing_ok=True)  # readers prefer a single file, which would now be the old one
    return [*files, index]


class _Info:
    """What the header says about one tensor; the tensor itself is not kept."""

    __slots__ = ("dtype", "name", "shape", "size_bytes", "tag")

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        if not isinstance(name, str) or name == "__metadata__":
            raise UsageError(f"tensors: {name!r} cannot be the name of a tensor.")
        if tensor.dtype not in TAGS or tensor.layout is not torch.strided:
            kind = f"{tensor.dtype}, {tensor.layout}"
            raise UsageError(f"{name}: safetensors has no place for {kind}.")
        self.name = name
        self.dtype = tensor.dtype
        self.tag = TAGS[tensor.dtype]
        self.shape = list(tensor.shape)
        self.size_bytes = tensor.numel() * tensor.dtype.itemsize


def _split(infos: list[_Info], shard_bytes: int) -> list[list[_Info]]:
    """Fill one shard after another, in the order given."""
    shards: list[list[_Info]] = [[]]
    filled = 0
    for info in infos:
        if shards[-1] and filled + info.size_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += info.size_bytes
    return shards


def _write_file(
    file: Path,
    infos: list[_Info],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    ordered = sorted(infos, key=lambda info: -info.dtype.itemsize)  # stable
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for info in ordered:
        offsets = [position, position + info.size_bytes]
        header[info.name] = {"dtype": info.tag, "shape": info.shape, "data_offsets": offsets}
        position = offsets[1]
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"tensors: {error.object[error.start - 8 :]!r} is not Unicode.") from error
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with replacing(file) as output:
        output.write(len(text).to_bytes(8, "little"))
        output.write(text)
        for info in ordered:
            tensor = tensors[info.name]
            if tensor.dtype != info.dtype or list(tensor.shape) != info.shape:
                raise UsageError(f"{info.name}: changed while it was being written.")
            output.write(tensor_bytes(tensor))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The numbers of `tensor` in row-major order, without a copy where they already lie so."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
