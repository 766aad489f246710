"""Faults to be planted in a healthy checkpoint, and how the doctor is asked for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qwenkit.checkpoint import write_safetensors
from qwenkit.survey.doctor import examine
from tiny import CONFIG, tiny_tensors

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 3554214752\n"
CONFIG_FILE, GENERATION, SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
)
INDEX = "model.safetensors.index.json"
Plant = Callable[[Path], object]


def edit(folder: Path, name: str, *without: str, **values: Any) -> None:
    """Change keys of a JSON file."""
    file = folder / name
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({k: v for k, v in (known | values).items() if k not in without}))


def config(*without: str, **values: Any) -> Plant:
    return lambda folder: edit(folder, CONFIG_FILE, *without, **values)


def generation(*without: str, **values: Any) -> Plant:
    return lambda folder: edit(folder, GENERATION, *without, **values)


def settings(*without: str, **values: Any) -> Plant:
    return lambda folder: edit(folder, SETTINGS, *without, **values)


def remove(*names: str) -> Plant:
    def plant(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return plant


def write(name: str, text: str = "") -> Plant:
    return lambda folder: (folder / name).write_text(text)


def tensors(change: Callable[[dict[str, torch.Tensor]], object], **values: Any) -> Plant:
    """Write other weights, and change keys of the config."""

    def plant(folder: Path) -> None:
        held = tiny_tensors(CONFIG)
        change(held)
        write_safetensors(folder / "model.safetensors", held)
        edit(folder, CONFIG_FILE, **values)

    return plant


def in_parts(change: Plant) -> Plant:
    """The weights in several files, then a change."""

    def plant(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        write_safetensors(folder / "model.safetensors", tiny_tensors(CONFIG), shard_bytes=20_000)
        change(folder)

    return plant


def first_part(folder: Path) -> Path:
    return min(folder.glob("model-*-of-*.safetensors"))


def deeper(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    for file in [f for f in folder.iterdir() if f.is_file()]:
        file.rename(inner / file.name)


def adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def dead_link(folder: Path) -> None:
    (folder / "qwen.tiktoken").unlink()
    (folder / "qwen.tiktoken").symlink_to(folder / "blobs" / "gone")


def two_vocabularies(folder: Path) -> None:
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))


def no_merges(folder: Path) -> None:
    (folder / "qwen.tiktoken").unlink()
    (folder / "vocab.json").write_text(json.dumps({"a": 0}))


def chat_that_ends_at_text(folder: Path) -> None:
    edit(folder, GENERATION, eos_token_id=[256])
    edit(folder, CONFIG_FILE, eos_token_id=256)
    edit(folder, SETTINGS, eos_token="<|endoftext|>")


def many_rows(folder: Path) -> None:
    """A model of many tokens with the tokenizer of few."""
    write_safetensors(folder / "model.safetensors", tiny_tensors(CONFIG | {"vocab_size": 4000}))
    edit(folder, CONFIG_FILE, vocab_size=4000)


def index(change: Callable[[dict[str, str]], object]) -> Plant:
    """Change the index's map of tensors to files."""

    def plant(folder: Path) -> None:
        known = json.loads((folder / INDEX).read_text())
        change(known["weight_map"])
        (folder / INDEX).write_text(json.dumps(known))

    return plant


def scale(name: str, factor: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda held: held.update({name: held[name] * factor})


NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}

# What one fault brings along, which is none of itself.
ALSO = {
    "adapter-only": {"empty-file"},
    "two-vocabularies": {"broken-tokenizer"},
    "vocabulary-too-large": {"wrong-shape"},
}


def faults(path: Path) -> set[str]:
    return {finding.kind for finding in examine(path) if finding.severity == "fault"}


def kind_of(value: object) -> str | None:
    """The name of a test's case."""
    return value if isinstance(value, str) else None


def assert_found(kind: str, plant: Plant, healthy: Path, target: Path) -> None:
    """The doctor finds what is planted, says it in two languages, and finds no more."""
    folder = target / healthy.name
    shutil.copytree(healthy, folder)
    plant(folder)
    assert faults(folder) == {kind} | ALSO.get(kind, set())
    found = next(finding for finding in examine(folder) if finding.kind == kind)
    assert found.english
    assert found.english.endswith((".", "?"))
    assert any("\u4e00" <= character <= "\u9fff" for character in found.chinese)
