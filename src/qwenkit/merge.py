"""Room 4½: a model with an adapter in its weights, written as one that needs no adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qwenkit.adapter_files import read_adapter
from qwenkit.adapters.lora import Merging
from qwenkit.checkpoint.safetensors_write import DEFAULT_SHARD_BYTES
from qwenkit.load import load
from qwenkit.save import save_folder


def merge_folder(
    source: str | Path,
    adapter: str | Path,
    folder: str | Path,
    *,
    dequantize: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[float], None] | None = None,
) -> list[Path]:
    """Write the model at `source` with the adapter at `adapter` merged into it into `folder`.

    Tokenizer, template and generation config go along; weights keep the dtype that they are stored
    in, and the sum is rounded to it once. With `dequantize` a quantized model becomes plain
    numbers; without, it is refused. Returns the files of the weights. Raises as `load`,
    `read_adapter` and `save_folder`.
    """
    merging = Merging(read_adapter(adapter), dequantize=dequantize)
    loaded = load(source, dtype="float32", merging=merging, progress=progress)
    return save_folder(loaded, folder, shard_bytes=shard_bytes)
