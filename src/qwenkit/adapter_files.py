"""Room 4: reads and writes the files of an adapter, where PEFT's layout meets the file readers."""

from __future__ import annotations

from pathlib import Path

from qwenkit.adapters.config import read_config
from qwenkit.adapters.peft_files import LoraAdapter, from_tensors, to_tensors
from qwenkit.checkpoint import write_safetensors
from qwenkit.checkpoint.members import member, read_json
from qwenkit.checkpoint.names import given_path
from qwenkit.checkpoint.safetensors import read_safetensors
from qwenkit.checkpoint.torch_bin import read_torch_bin
from qwenkit.errors import CheckpointError, ConfigError, ModelNotFoundError
from qwenkit.save import write_json

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def read_adapter(folder: str | Path) -> LoraAdapter:
    """The adapter of a folder in PEFT's layout. Nothing in its files is ever run.

    Raises ModelNotFoundError when it is no folder, CheckpointError or NonFiniteError naming file
    and tensor, ConfigError naming file and key.
    """
    folder = given_path("adapter", folder)
    config_file = member(folder, CONFIG_FILE) if folder.is_dir() else None
    if config_file is None:
        raise ModelNotFoundError(
            f"{folder}: is no adapter. Give a folder with {CONFIG_FILE} and {WEIGHT_FILES[0]}."
        )
    try:
        config = read_config(read_json(config_file))
    except ConfigError as error:
        raise ConfigError(f"{config_file}: {error}") from error
    file = next((f for name in WEIGHT_FILES if (f := member(folder, name))), None)
    if file is None:
        raise CheckpointError(folder, WEIGHT_FILES[0], "is missing, and so is adapter_model.bin.")
    stored = (read_safetensors if file.suffix == ".safetensors" else read_torch_bin)(file)
    try:
        return from_tensors(config, {n: t.read() for n, t in stored.items()}, file=file)
    except ConfigError as error:  # a pattern that is none, met at the first name
        raise ConfigError(f"{config_file}: {error}") from error


def write_adapter(adapter: LoraAdapter, folder: str | Path) -> None:
    """Write an adapter as `read_adapter` and PEFT read it, its config as it was.

    Raises CheckpointError when the disk refuses.
    """
    folder = given_path("folder", folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(folder, "folder", f"cannot be made: {error.strerror}.") from error
    write_json(folder / CONFIG_FILE, adapter.config.given)
    tensors = dict(sorted(to_tensors(adapter).items()))
    write_safetensors(folder / WEIGHT_FILES[0], tensors)
    (folder / WEIGHT_FILES[1]).unlink(missing_ok=True)  # would be another adapter's
