"""The doctor on the tensors: names, shapes and numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from clean_models import CLEAN
from planting import (
    CONFIG_FILE,
    EMBEDDING,
    HEAD,
    NORM,
    UP,
    Plant,
    assert_found,
    config,
    edit,
    faults,
    kind_of,
    scale,
    tensors,
)

from qwenkit.checkpoint import open_checkpoint, write_safetensors
from qwenkit.load import load
from qwenkit.save import save_gguf
from qwenkit.survey.doctor import examine

# (kind of fault, how it is planted)
PLANTED: list[tuple[str, Plant]] = [
    ("missing-tensor", tensors(lambda held: held.pop(UP))),
    ("missing-tensor", config(num_hidden_layers=1000)),
    ("extra-tensor", tensors(lambda held: held.update({"model.norm.bias": held[NORM]}))),
    ("extra-tensor", config(num_hidden_layers=1)),
    ("wrong-shape", config(intermediate_size=64)),
    ("untied-without-head", tensors(lambda held: held.pop(HEAD))),
    ("tied-but-different", config(tie_word_embeddings=True)),
    ("untied-but-same", tensors(lambda held: held.update({HEAD: held[EMBEDDING].clone()}))),
    ("non-finite", tensors(scale(NORM, float("nan")))),
    ("zero-weights", tensors(scale(UP, 0.0))),
    ("dtype-mismatch", config(torch_dtype="bfloat16")),
    ("unknown-dtype", config(torch_dtype="float7")),
    ("unknown-dtype", config(torch_dtype=16)),
]


@pytest.mark.parametrize(("kind", "plant"), PLANTED, ids=kind_of)
def test_what_is_planted_is_found(kind: str, plant: Plant, healthy: Path, tmp_path: Path) -> None:
    assert_found(kind, plant, healthy, tmp_path)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen2_moe", "qwen3"])
def test_float16_is_a_note(model_type: str, tmp_path: Path) -> None:
    folder = CLEAN["chat" if model_type == "qwen2" else model_type](tmp_path / "model")
    held = {name: tensor.read().half() for name, tensor in open_checkpoint(folder).tensors.items()}
    write_safetensors(folder / "model.safetensors", held)
    edit(folder, CONFIG_FILE, torch_dtype="float16")
    kinds = {finding.kind: finding.severity for finding in examine(folder)}
    assert kinds["float16-weights"] == "note"
    assert "fault" not in kinds.values()
    save_gguf(load(folder), tmp_path / "m.gguf", storage="F16")
    assert faults(tmp_path / "m.gguf") == set()
