"""Folders of AutoGPTQ and AutoAWQ that say how they are quantized in a file of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantized_made import DENSE, write_quantized
from qwenkit.checkpoint import open_checkpoint
from qwenkit.errors import CheckpointError, ConfigError
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import load
from qwenkit.quantize.settings import QuantizeSettings
from tiny import write_tiny_checkpoint

GPTQ: dict[str, Any] = {
    "bits": 4,
    "group_size": 32,
    "damp_percent": 0.01,
    "desc_act": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
}
AWQ: dict[str, Any] = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
FILES = {"gptq": ("quantize_config.json", GPTQ), "awq": ("quant_config.json", AWQ)}


def _made(folder: Path, method: str) -> Path:
    _, path, _ = write_quantized(folder, QuantizeSettings(method=method, group_size=32))
    return path


def _logits(path: Path) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = load(path).model(torch.arange(9), PackedCausal([9]))
    return logits


def _silence(path: Path) -> None:
    """Take the word out of config.json."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_older_folder_is_read(tmp_path: Path, method: str) -> None:
    path = _made(tmp_path, method)
    expected, (name, older) = _logits(path), FILES[method]
    (path / name).write_text(json.dumps(older))
    assert torch.equal(_logits(path), expected)  # both speak, and say the same
    _silence(path)
    assert torch.equal(_logits(path), expected)
    block = open_checkpoint(path).config["quantization_config"]
    assert (block["quant_method"], block["bits"], block["group_size"]) == (method, 4, 32)
    (path / name).write_text("{bits")
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(path)
    (path / name).unlink()
    with pytest.raises((CheckpointError, ConfigError), match="qweight"):
        load(path)


@pytest.mark.parametrize(
    ("method", "changed", "message"),
    [
        ("gptq", {"bits": 8}, r"quantize_config\.json.*bits.* 8, but config\.json .* says 4"),
        ("gptq", {"group_size": 64}, r"quantize_config\.json.*group_size.* 64, but config\.json"),
        ("gptq", {"quant_method": "awq"}, r"quant_method.* 'awq', but config\.json .* 'gptq'"),
        ("awq", {"w_bit": 8}, r"quant_config\.json.*bits.* 8, but config\.json .* says 4"),
        ("awq", {"q_group_size": -1}, r"quant_config\.json.*group_size.* -1, but config\.json"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    tmp_path: Path, method: str, changed: dict[str, Any], message: str
) -> None:
    path = _made(tmp_path, method)
    name, older = FILES[method]
    (path / name).write_text(json.dumps(older | changed))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_two_older_files_that_differ_are_refused(tmp_path: Path) -> None:
    path = _made(tmp_path, "gptq")
    _silence(path)
    for name, older in FILES.values():
        (path / name).write_text(json.dumps(older))
    with pytest.raises(CheckpointError, match=r"quant_config.*'awq', but quantize_config\.json"):
        open_checkpoint(path)


def test_auto_rounds_name_contradicts_nobody(tmp_path: Path) -> None:
    path = _made(tmp_path, "gptq")
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
    }
    file.write_text(json.dumps(config))
    assert open_checkpoint(path).config == config


def test_beside_plain_weights_such_a_file_says_nothing(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "plain", config=DENSE)
    (path / "quantize_config.json").write_text(json.dumps(GPTQ))
    assert "quantization_config" not in open_checkpoint(path).config
    load(path)
