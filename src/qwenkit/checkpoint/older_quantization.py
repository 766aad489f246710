"""How older folders say that they are quantized: in a file of its own beside `config.json`.

AutoGPTQ wrote `quantize_config.json`, AutoAWQ `quant_config.json`, and programs of today still put
one of them beside a `config.json` that says the same under `quantization_config`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwenkit.checkpoint.members import member, read_json
from qwenkit.errors import CheckpointError

_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}  # AutoAWQ's older ones
_MARK = ".qweight"  # GPTQ's and AWQ's matrices; of plain ones such a file says nothing
_COMPARED = ("quant_method", "bits", "group_size")


def with_older_quantization(
    folder: Path, config: dict[str, Any], tensors: Iterable[str]
) -> dict[str, Any]:
    """`config` with what the folder's older file says under `quantization_config`, where that is
    missing and the names of the `tensors` say that the weights are quantized.

    Raises CheckpointError naming both files where two contradict each other in method, bits or
    group size, and as `read_json` for a file that cannot be read.
    """
    if not any(name.endswith(_MARK) for name in tensors):
        return config
    known = config.get("quantization_config")
    source = "config.json"
    for name, method in _FILES.items():
        file = member(folder, name)
        if file is None:
            continue
        block = _in_todays_words(read_json(file), method)
        if known is None:
            known, source = block, name
        elif isinstance(known, Mapping):  # of anything else its reader complains
            _check_same(file, block, source, known)
    return config if known is None else config | {"quantization_config": known}


def _in_todays_words(given: Mapping[str, Any], method: str) -> dict[str, Any]:
    """AutoGPTQ's files name a method only since there were several: of those the file's name says
    it.
    """
    block = {_NAMES.get(key, key): value for key, value in given.items()}
    if block.get("quant_method") is None:
        block["quant_method"] = method
    return block


def _check_same(
    file: Path, block: Mapping[str, Any], source: str, known: Mapping[str, Any]
) -> None:
    stated = _in_todays_words(known, "")
    for key in _COMPARED:
        ours, theirs = block.get(key), stated.get(key)
        if key == "quant_method" and "round" in f"{ours} {theirs}":
            continue  # AutoRound's name for files in GPTQ's or AWQ's layout
        if ours is not None and theirs not in (None, "") and ours != theirs:
            raise CheckpointError(
                file,
                key,
                f"is {ours!r}, but {source} beside it says {theirs!r}. Only one of them can be "
                "right: correct or remove the other file's word.",
            )
