"""Baichuan2-13B as a GGUF: one matrix for three, rows in pairs, a head with rows of length one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from qwenkit.checkpoint import open_checkpoint, write_gguf
from qwenkit.errors import CheckpointError, ConfigError
from qwenkit.formats.ggml import GgmlWeight
from qwenkit.load import Loaded, load, read_architecture
from qwenkit.models.spec import CausalModel, find
from qwenkit.save import save_folder, save_gguf
from tiny import CONFIG, write_tiny_checkpoint

HEADS, HEAD_DIM = 4, 8
SHAPE: dict[str, Any] = CONFIG | {
    "model_type": "baichuan",
    "max_position_embeddings": None,
    "model_max_length": 64,
    "z_loss_weight": 0,
}


def model() -> CausalModel:
    architecture = find("baichuan")
    built = architecture.build(architecture.config(SHAPE))
    generator = torch.Generator().manual_seed(0)
    for parameter in built.requires_grad_(False).parameters():
        parameter.normal_(float(parameter.ndim == 1), 0.3, generator=generator)
    return built


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("baichuan") / "first"
    return load(write_tiny_checkpoint(folder, config=SHAPE, tensors=dict(model().state_dict())))


@pytest.fixture(scope="module")
def saved(source: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("baichuan") / "second.gguf"
    save_gguf(source, file)
    return file


def rewritten(file: Path, target: Path, **metadata: Any) -> Path:
    """The same GGUF with other metadata; None takes a key out."""
    read = open_checkpoint(file)
    changed = {**read.gguf_metadata, "tokenizer.ggml.merges": ("str", [])} | {
        f"baichuan.{key.replace('__', '.')}": value for key, value in metadata.items()
    }
    kept = {key: value for key, value in changed.items() if value is not None}
    tensors = [(t.name, t.shape, t.storage, t.read()) for t in read.tensors.values()]
    write_gguf(target, kept, tensors)
    return target


def test_the_matrix_is_parted_and_its_rows_are_in_pairs(source: Loaded, saved: Path) -> None:
    tensors = open_checkpoint(saved).tensors
    assert not any("qkv" in name for name in tensors)
    packed = source.model.get_parameter("model.layers.1.self_attn.W_pack.weight")
    q, k, v = packed.chunk(3)
    half = HEAD_DIM // 2
    pairs = [h * HEAD_DIM + i + j * half for h in range(HEADS) for i in range(half) for j in (0, 1)]
    assert pairs[:4] == [0, 4, 1, 5]
    for name, expected in (("q", q[pairs]), ("k", k[pairs]), ("v", v)):
        assert torch.equal(tensors[f"blk.1.attn_{name}.weight"].read(), expected)


def test_the_head_is_written_as_other_engines_use_it(source: Loaded, saved: Path) -> None:
    head = source.model.get_parameter("lm_head.weight")
    written = open_checkpoint(saved).tensors["output.weight"].read()
    torch.testing.assert_close(written.norm(dim=1), torch.ones(len(written)))
    torch.testing.assert_close(written, functional.normalize(head, dim=1))


def test_every_other_weight_comes_back_bit_for_bit(
    source: Loaded, saved: Path, tmp_path: Path
) -> None:
    save_folder(load(saved), tmp_path / "third")
    for path in (saved, tmp_path / "third"):
        again = load(path)
        assert again.config == source.config
        for name, tensor in source.model.state_dict().items():
            if name != "lm_head.weight":
                assert torch.equal(again.model.state_dict()[name], tensor), name


def test_blocks_are_parted_too(source: Loaded, tmp_path: Path) -> None:
    loaded = load(
        write_tiny_checkpoint(tmp_path / "a", config=SHAPE, tensors=dict(model().state_dict()))
    )
    for layer in loaded.model.model.layers:  # type: ignore[union-attr]
        weight = layer.self_attn.W_pack.weight
        del layer.self_attn.W_pack.weight
        layer.self_attn.W_pack.weight = GgmlWeight.quantize(weight, "Q8_0")
    save_gguf(loaded, tmp_path / "b.gguf")
    again = load(tmp_path / "b.gguf").model.state_dict()
    name = "model.layers.1.self_attn.W_pack.weight.blocks"
    assert torch.equal(again[name], loaded.model.state_dict()[name])


def test_what_others_wrote_is_told_by_its_sizes(saved: Path, tmp_path: Path) -> None:
    """By the number of layers, as llama.cpp tells them; these have 2."""
    with pytest.raises(ConfigError, match="rotary models, such as Baichuan2-7B"):
        load(rewritten(saved, tmp_path / "7b.gguf", attention__max_alibi_bias=None))
    theirs = rewritten(saved, tmp_path / "13b.gguf", attention__max_alibi_bias=None, block_count=40)
    config = read_architecture(open_checkpoint(theirs))[1]
    assert config.max_position_embeddings == 64
    assert config.num_hidden_layers == 40
    with pytest.raises(ConfigError, match=r"max_alibi_bias: got 4\.0; only 8\.0"):
        load(rewritten(saved, tmp_path / "4.gguf", attention__max_alibi_bias=4.0))


def test_the_first_baichuan_is_refused(saved: Path, tmp_path: Path) -> None:
    read = open_checkpoint(saved)
    tensors = [(t.name, t.shape, t.storage, t.read()) for t in read.tensors.values()]
    rows = ("token_embd.weight", (64_000, 32), "F16", torch.zeros(64_000, 32).half())
    kept = {**read.gguf_metadata, "tokenizer.ggml.merges": ("str", [])}
    write_gguf(tmp_path / "x.gguf", kept, [rows, *(t for t in tensors if t[0] != rows[0])])
    with pytest.raises(ConfigError, match="as in the first Baichuan"):
        load(tmp_path / "x.gguf")


def test_a_part_that_is_missing_is_named(saved: Path, tmp_path: Path) -> None:
    read = open_checkpoint(saved)
    kept = {**read.gguf_metadata, "tokenizer.ggml.merges": ("str", [])}
    tensors = [(t.name, t.shape, t.storage, t.read()) for t in read.tensors.values()]
    write_gguf(tmp_path / "x.gguf", kept, [t for t in tensors if t[0] != "blk.1.attn_v.weight"])
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_v\.weight: is missing"):
        load(tmp_path / "x.gguf")
