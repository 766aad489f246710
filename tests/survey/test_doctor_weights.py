"""The doctor on the tensors: names, shapes and numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from planting import (
    EMBEDDING,
    HEAD,
    NORM,
    UP,
    Plant,
    assert_found,
    config,
    half,
    kind_of,
    scale,
    tensors,
)

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
    ("float16-weights", tensors(half, torch_dtype="float16")),
]


@pytest.mark.parametrize(("kind", "plant"), PLANTED, ids=kind_of)
def test_what_is_planted_is_found(kind: str, plant: Plant, healthy: Path, tmp_path: Path) -> None:
    assert_found(kind, plant, healthy, tmp_path)
