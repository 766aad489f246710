"""What vLLM is given is what our own quantizer would say: packed nibbles, scales by group."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qwenkit.bench.peers.spec import Arrival, Load, Options, WeightSetting
from qwenkit.bench.peers.vllm import prepare


def test_int4_weights_are_packed_low_nibble_first(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    matrix = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))  # [rows, columns]
    norm = torch.ones(4)
    tensors = {"model.q_proj.weight": matrix, "model.norm.weight": norm}
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    weights = WeightSetting(name="int4", group_size=32)
    options = Options(threads=1, most_prompt_tokens=1, most_positions=1, weights=weights)
    prepare(source, target, options)
    found = load_file(target / "model.safetensors")
    assert torch.equal(found["model.norm.weight"], norm)
    assert found["model.q_proj.weight_shape"].tolist() == [4, 64]
    packed, scale = found["model.q_proj.weight_packed"], found["model.q_proj.weight_scale"]
    assert (packed.dtype, packed.shape, scale.shape) == (torch.int32, (4, 8), (4, 2))
    nibbles = (packed[:, :, None] >> (4 * torch.arange(8))) & 15  # [rows, words, nibbles]
    values = (nibbles.reshape(4, 2, 32) - 8) * scale[:, :, None]  # [rows, groups, group_size]
    assert (values.reshape(4, 64) - matrix).abs().max() <= scale.max() / 2 + 1e-6
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32


def test_a_closed_loop_survives_being_sent() -> None:
    load = Load((Arrival(0.0, 8, 4),) * 2, at_most=1)
    assert Load.from_json(load.to_json()) == load
    assert Load.from_json({"arrivals": []}).at_most is None
