"""Opening of a checkpoint, whatever lies at the path: a model folder, or one file.

A folder's weights are taken from safetensors, else from PyTorch's `.bin`, else from its only GGUF.
No weight is read here, only headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from qwenkit.checkpoint.gguf import MAGIC
from qwenkit.checkpoint.gguf_model import open_gguf
from qwenkit.checkpoint.hub_cache import repository_name
from qwenkit.checkpoint.licence import read_licence
from qwenkit.checkpoint.members import member, read_json, read_text, refuse_lfs_pointer
from qwenkit.checkpoint.names import given_path
from qwenkit.checkpoint.older_quantization import with_older_quantization
from qwenkit.checkpoint.safetensors import read_safetensors
from qwenkit.checkpoint.sharded import ReadFile, read_sharded
from qwenkit.checkpoint.spec import Checkpoint, Container, StoredTensor
from qwenkit.checkpoint.torch_bin import read_torch_bin
from qwenkit.errors import CheckpointError, ModelNotFoundError

_READERS: Mapping[Container, ReadFile] = {
    "safetensors": read_safetensors,
    "torch_bin": read_torch_bin,
}
_WEIGHTS: tuple[tuple[str, Container], ...] = (
    ("model.safetensors", "safetensors"),
    ("model.safetensors.index.json", "safetensors"),
    ("pytorch_model.bin", "torch_bin"),
    ("pytorch_model.bin.index.json", "torch_bin"),
)
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "qwen.tiktoken")
_SHARD_MARK = "-of-"


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model folder, a GGUF, or one `.safetensors` or `.bin` with its folder around it.

    Raises ModelNotFoundError when nothing is there, CheckpointError naming the file and field when
    something is missing, malformed or contradictory. No tensor data is read.
    """
    path = given_path("path", path)
    try:
        is_there, is_folder, is_file = path.exists(), path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{str(path)!r} cannot be opened: {error}.") from error
    if is_folder:
        return _open_folder(path)
    if not is_file:
        what = "is not a regular file" if is_there else "there is no such file or folder"
        raise ModelNotFoundError(f"{path}: {what}. Give a model folder or a .gguf file.")
    if path.suffix == ".safetensors":
        return _assemble(path.parent, path.stem, "safetensors", read_safetensors(path))
    if path.suffix == ".bin":
        return _assemble(path.parent, path.stem, "torch_bin", read_torch_bin(path))
    if path.suffix == ".gguf" or _starts_as_gguf(path):
        return open_gguf(path)
    raise CheckpointError(path, "file", "is no .gguf, .safetensors or .bin; give a model folder.")


def _starts_as_gguf(path: Path) -> bool:
    """True for a GGUF that goes by another name, as in download caches."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise CheckpointError(path, "file", f"cannot be read: {error.strerror}.") from error


def _open_folder(folder: Path) -> Checkpoint:
    place = folder.resolve()
    name = repository_name(place) or place.name
    for file_name, container in _WEIGHTS:
        if file := member(folder, file_name):
            read_file = _READERS[container]
            if file.suffix == ".json":
                read_file = partial(read_sharded, read_file=read_file)
            return _assemble(folder, name, container, read_file(file))
    if file := _only_file(folder, "*.safetensors"):
        return _assemble(folder, name, "safetensors", read_safetensors(file))
    if file := _only_file(folder, "*.gguf"):
        return open_gguf(file)
    names = ", ".join(file_name for file_name, _ in _WEIGHTS)
    raise CheckpointError(folder, "weights", f"are missing; expected {names} or one *.gguf.")


def _only_file(folder: Path, pattern: str) -> Path | None:
    """The one file of this kind; adapters are not a model's weights."""
    try:
        names = sorted(f.name for f in folder.glob(pattern) if not f.name.startswith("adapter_"))
    except OSError as error:
        raise CheckpointError(folder, "folder", f"cannot be listed: {error.strerror}.") from error
    if not names:
        return None
    if len(names) == 1 and _SHARD_MARK not in names[0]:
        return member(folder, names[0])
    listed = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    if any(_SHARD_MARK in n for n in names) and pattern == "*.safetensors":
        raise CheckpointError(
            folder, "model.safetensors.index.json", f"is missing, but its parts are here: {listed}."
        )
    raise CheckpointError(folder, pattern, f"there are {len(names)}: {listed}. Name one of them.")


def _assemble(
    folder: Path, name: str, container: Container, tensors: Mapping[str, StoredTensor]
) -> Checkpoint:
    """Put the tensors together with what the folder's other files say."""
    config = _json(folder, "config.json")
    if config is None:
        raise CheckpointError(
            folder, "config.json", "is missing; without it the weights cannot be understood."
        )
    for file_name in _TOKENIZER_FILES:
        if file := member(folder, file_name):
            refuse_lfs_pointer(file)
    tokenizer_config = _json(folder, "tokenizer_config.json") or {}
    return Checkpoint(
        name=name,
        path=folder,
        container=container,
        config=with_older_quantization(folder, config, tensors),
        tensors=tensors,
        folder=folder,
        generation_config=_json(folder, "generation_config.json") or {},
        tokenizer_config=tokenizer_config,
        chat_template=_chat_template(folder, tokenizer_config),
        licence=read_licence(folder, config),
    )


def _json(folder: Path, name: str) -> dict[str, Any] | None:
    file = member(folder, name)
    return None if file is None else read_json(file)


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """From a file of its own if there is one, else from the tokenizer's settings."""
    if file := member(folder, "chat_template.jinja"):
        return read_text(file)
    if file := member(folder, "chat_template.json"):
        return _one_template(file, read_json(file).get("chat_template"))
    source = folder / "tokenizer_config.json"
    return _one_template(source, tokenizer_config.get("chat_template"))


def _one_template(file: Path, value: object) -> str | None:
    """The text itself, or the one named "default" of a list of named templates."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise CheckpointError(file, "chat_template", "expected text or a list of named templates.")
    named: dict[str, str] = {}
    for item in value:
        pair = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
        if not isinstance(pair[0], str) or not isinstance(pair[1], str):
            raise CheckpointError(file, "chat_template", "every item needs a name and a template.")
        named[pair[0]] = pair[1]
    return named.get("default")
