"""Reading of PyTorch's own checkpoint files, without ever running what is in them.

A `.bin` is a pickle, and a pickle is a program. `torch.load(weights_only=True)` runs only the few
instructions that build tensors; nothing here, and nothing that calls it, has another way in. The
file is looked at first: only the two layouts that torch.save writes get that far, and in the zip
layout nothing may be compressed, for a compressed member can grow a thousandfold in memory.
"""

from __future__ import annotations

import math
import re
import zipfile
from functools import partial
from pathlib import Path

import torch
from torch.types import Storage

from qwenkit.checkpoint.members import clip, refuse_lfs_pointer
from qwenkit.checkpoint.spec import StoredTensor
from qwenkit.checkpoint.storages import TAGS
from qwenkit.errors import CheckpointError

_SAFE_TORCH = (2, 10)  # before it, CVE-2026-24747 let a pickle out of weights_only
_ZIP_START = b"PK\x03\x04"
_LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # torch.save to 1.5
_MAX_PICKLE_BYTES = 100_000_000
_ADVICE = (
    "Only tensors are read from such a file; code in it is never run, and there is no way to "
    "allow it. Ask for the model in safetensors."
)


def read_torch_bin(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name: memory-mapped in the zip layout, in memory in the layout
    before PyTorch 1.6.

    Raises CheckpointError for anything but a flat dictionary of plain tensors.
    """
    refuse_lfs_pointer(file)
    if _version() < _SAFE_TORCH:
        raise CheckpointError(
            file,
            "torch",
            f"version {torch.__version__} cannot read pickles safely; "
            f"update to {'.'.join(map(str, _SAFE_TORCH))} or later, or use safetensors.",
        )
    loaded = _load(file)
    if not isinstance(loaded, dict):
        kind = type(loaded).__name__
        raise CheckpointError(file, "pickle", f"holds one {kind}, not tensors by name.")
    return {name: _stored(file, name, value) for name, value in loaded.items()}


def _version() -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])


def _load(file: Path) -> object:
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(len(_LEGACY_START))
    except OSError as error:
        raise CheckpointError(file, "file", f"cannot be read: {error.strerror}.") from error
    if start.startswith(_ZIP_START):
        _check_members(file)
        mapped = True
    elif start == _LEGACY_START:
        mapped = False
    else:
        raise CheckpointError(file, "content", f"is no file that torch.save writes. {_ADVICE}")
    try:
        if mapped:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return torch.load(file, map_location=_Allotment(size), weights_only=True)
    except Exception as error:  # whatever torch makes of a hostile file
        raise CheckpointError(file, "pickle", f"refused: {_reason(error)}. {_ADVICE}") from error


def _check_members(file: Path) -> None:
    """Hold the zip's table of contents against the file before torch reads any of it."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise CheckpointError(file, "zip", f"cannot be read: {error}.") from error
    pickles = [m for m in members if m.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise CheckpointError(
            file, "data.pkl", f"expected one, of at most {_MAX_PICKLE_BYTES:,} bytes."
        )
    for info in members:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise CheckpointError(
                file, clip(info.filename), f"is compressed, which torch.save never does. {_ADVICE}"
            )


class _Allotment:
    """Gives each storage of the old layout its memory: as much as the file has bytes, in all.

    torch allots memory by the pickle's word and fills it afterwards, if the pickle says so. What
    stays unfilled must not be this process's old memory, so it is zeroed here.
    """

    def __init__(self, size_bytes: int) -> None:
        self.left_bytes = size_bytes

    def __call__(self, storage: Storage, location: str) -> Storage:
        self.left_bytes -= storage.nbytes()
        if self.left_bytes < 0:
            raise ValueError("it asks for more memory than the file has bytes")
        torch.empty(0, dtype=torch.uint8).set_(storage).zero_()
        return storage


def _reason(error: Exception) -> str:
    """What stopped torch, without its advice to trust the file."""
    text = str(error)
    if match := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it calls {match[1]}"
    return (
        f"{type(error).__name__}: {text.splitlines()[-1].strip()[:200] if text else 'no message'}"
    )


def _stored(file: Path, name: object, value: object) -> StoredTensor:
    if not isinstance(name, str):
        raise CheckpointError(file, clip(name), "is no name of a tensor.")
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(file, clip(name), f"is of type {type(value).__name__}, not a tensor.")
    plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.dtype not in TAGS:
        raise CheckpointError(
            file, clip(name), f"is a {value.dtype} tensor, {value.layout}, which cannot be read."
        )
    tensor = value.detach()
    size = math.prod(tensor.shape) * tensor.dtype.itemsize
    if size > tensor.untyped_storage().nbytes():  # strides of 0 make terabytes of one number
        raise CheckpointError(
            file, clip(name), f"shape {list(tensor.shape)} is larger than what is stored."
        )
    return StoredTensor(
        name=name,
        shape=tuple(tensor.shape),
        storage=TAGS[tensor.dtype],
        size_bytes=size,
        file=file,
        read=partial(torch.Tensor.contiguous, tensor),
    )
