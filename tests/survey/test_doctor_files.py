"""The doctor on the files themselves: which are there, whole, and of one model."""

from __future__ import annotations

from pathlib import Path

import pytest
from planting import (
    CONFIG_FILE,
    GENERATION,
    INDEX,
    LFS,
    SETTINGS,
    UP,
    Plant,
    adapter,
    assert_found,
    cut,
    dead_link,
    deeper,
    first_part,
    in_parts,
    index,
    kind_of,
    no_merges,
    remove,
    write,
)

# (kind of fault, how it is planted)
PLANTED: list[tuple[str, Plant]] = [
    ("lfs-pointer", write("model.safetensors", LFS)),
    ("lfs-pointer", write("qwen.tiktoken", LFS)),
    ("lfs-pointer", write(CONFIG_FILE, LFS)),
    ("empty-file", write("model.safetensors")),
    ("empty-file", write(GENERATION)),
    ("broken-link", dead_link),
    ("unfinished-download", write("model.safetensors.incomplete", "x")),
    ("broken-json", write(CONFIG_FILE, '{"model_type": "qwen2",}')),
    ("broken-json", write(SETTINGS, "[]")),
    ("adapter-only", adapter),
    ("no-config", remove(CONFIG_FILE)),
    ("nested-folder", deeper),
    ("no-weights", remove("model.safetensors")),
    ("index-disagrees", in_parts(index(lambda tensors: tensors.pop(UP)))),
    (
        "index-disagrees",
        in_parts(index(lambda tensors: tensors.update(ghost=tensors[UP]))),
    ),
    ("missing-shard", in_parts(lambda folder: first_part(folder).unlink())),
    ("no-index", in_parts(remove(INDEX))),
    ("stray-shard", in_parts(write("model-00009-of-00009.safetensors", "old"))),
    ("damaged-weights", cut),
    ("damaged-weights", in_parts(lambda f: first_part(f).write_bytes(b"not a tensor in it"))),
    ("no-tokenizer", remove("qwen.tiktoken")),
    ("no-merges", no_merges),
    ("two-weights", write("pytorch_model.bin", "PK")),
]


@pytest.mark.parametrize(("kind", "plant"), PLANTED, ids=kind_of)
def test_what_is_planted_is_found(kind: str, plant: Plant, healthy: Path, tmp_path: Path) -> None:
    assert_found(kind, plant, healthy, tmp_path)
