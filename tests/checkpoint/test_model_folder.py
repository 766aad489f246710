"""Opening of whole model folders, and every way in which one can be incomplete."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from crafted import model_gguf

from qwenkit.checkpoint import open_checkpoint, write_safetensors
from qwenkit.errors import CheckpointError, ModelNotFoundError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 15231233\n"
WEIGHTS = {
    "transformer.wte.weight": torch.arange(12.0).reshape(4, 3),
    "transformer.h.0.attn.c_attn.bias": torch.tensor([1, 2], dtype=torch.bfloat16),
}


def put(folder: Path, **files: Any) -> Path:
    """Write files, named with `__` for a dot; anything but text goes in as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def model(folder: Path, **files: Any) -> Path:
    put(folder, **({"config__json": {"model_type": "qwen"}} | files))
    write_safetensors(folder / "model.safetensors", WEIGHTS)
    return folder


def test_a_folder_says_all_that_its_files_say(tmp_path: Path) -> None:
    folder = model(
        tmp_path / "Qwen-7B",
        config__json={"model_type": "qwen", "n_embd": 3, "n_layer": 1},
        generation_config__json={"top_p": 0.8},
        tokenizer_config__json={"model_max_length": 8192, "chat_template": "{{ 1 }}"},
        LICENSE="\n   Tongyi Qianwen LICENSE AGREEMENT\n\nTongyi Qianwen Release Date: …",
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.name == "Qwen-7B"
    assert (checkpoint.path, checkpoint.folder) == (folder, folder)
    assert checkpoint.container == "safetensors"
    assert checkpoint.config == {"model_type": "qwen", "n_embd": 3, "n_layer": 1}
    assert checkpoint.generation_config == {"top_p": 0.8}
    assert checkpoint.tokenizer_config["model_max_length"] == 8192
    assert checkpoint.chat_template == "{{ 1 }}"
    assert checkpoint.licence == "tongyi-qianwen"
    assert checkpoint.gguf_metadata == {}
    read = {name: stored.read() for name, stored in checkpoint.tensors.items()}
    assert set(read) == set(WEIGHTS)
    assert all(torch.equal(read[n], WEIGHTS[n]) for n in WEIGHTS)
    stored = checkpoint.tensors["transformer.h.0.attn.c_attn.bias"]
    assert (stored.shape, stored.storage, stored.size_bytes) == ((2,), "BF16", 4)


def test_every_container_gives_the_same_tensors(tmp_path: Path) -> None:
    single, sharded, torch_single, torch_sharded = (
        put(tmp_path / n, config__json={}) for n in "abcd"
    )
    write_safetensors(single / "model.safetensors", WEIGHTS)
    write_safetensors(sharded / "model.safetensors", WEIGHTS, shard_bytes=1)
    torch.save(WEIGHTS, torch_single / "pytorch_model.bin")
    weight_map = {}
    for number, (name, tensor) in enumerate(WEIGHTS.items()):
        weight_map[name] = f"pytorch_model-{number}.bin"
        torch.save({name: tensor}, torch_sharded / weight_map[name])
    put(torch_sharded, pytorch_model__bin__index__json={"weight_map": weight_map})
    for folder in (single, sharded, torch_single, torch_sharded):
        checkpoint = open_checkpoint(folder)
        assert checkpoint.container == (
            "safetensors" if folder in (single, sharded) else "torch_bin"
        )
        for name, tensor in WEIGHTS.items():
            stored = checkpoint.tensors[name]
            assert torch.equal(stored.read(), tensor)
            assert (stored.shape, stored.size_bytes) == (tuple(tensor.shape), tensor.nbytes)


def test_safetensors_come_before_bin_and_gguf(tmp_path: Path) -> None:
    folder = model(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    (folder / "m.gguf").write_bytes(b"not looked at")
    assert open_checkpoint(folder).container == "safetensors"


def test_files_can_be_named_themselves(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    assert open_checkpoint(folder / "model.safetensors").config == {"model_type": "qwen"}
    torch.save(WEIGHTS, folder / "other.bin")
    assert open_checkpoint(folder / "other.bin").container == "torch_bin"
    for name in ("tiny.gguf", "sha256-0123"):  # by content, as in download caches
        (tmp_path / name).write_bytes(model_gguf().build())
        assert open_checkpoint(tmp_path / name).container == "gguf"
    assert open_checkpoint(tmp_path / "tiny.gguf").name == "tiny"


def test_a_folder_with_one_gguf_is_that_gguf(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(model_gguf().build())
    assert open_checkpoint(tmp_path).name == "tiny"
    (tmp_path / "tiny-2.gguf").write_bytes(model_gguf().build())
    with pytest.raises(CheckpointError, match=r"tiny-2\.gguf, tiny\.gguf"):
        open_checkpoint(tmp_path)


def test_one_safetensors_of_another_name_is_taken_but_no_adapter(tmp_path: Path) -> None:
    folder = model(tmp_path)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert set(open_checkpoint(folder).tensors) == set(WEIGHTS)
    (folder / "weights.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="weights: are missing"):
        open_checkpoint(folder)


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "none.gguf", tmp_path / ("x" * 300)):
        with pytest.raises(ModelNotFoundError):
            open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="model folder"):
        open_checkpoint(tmp_path / "notes.txt")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "m.gguf")
    for path in (tmp_path, tmp_path / "m.gguf"):
        with pytest.raises((CheckpointError, ModelNotFoundError)):
            open_checkpoint(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = model(tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)
    put(folder, config__json={})
    (folder / "model.safetensors").unlink()
    files = write_safetensors(folder / "model.safetensors", WEIGHTS, shard_bytes=1)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json: {files[1].name}: .*missing"):
        open_checkpoint(folder)
    files[2].unlink()
    with pytest.raises(CheckpointError, match=r"index\.json: is missing"):
        open_checkpoint(folder)


def test_the_index_and_the_files_must_agree(tmp_path: Path) -> None:
    folder = put(tmp_path, config__json={})
    files = write_safetensors(folder / "model.safetensors", WEIGHTS, shard_bytes=1)
    right = json.loads(files[-1].read_text())["weight_map"]
    first, second = WEIGHTS
    for weight_map, message in (
        ({first: right[first], second: right[first]}, "is missing, though"),
        ({first: right[first]}, None),
        ({**right, "extra": right[second]}, "is missing, though"),
        ({first: right[second], second: right[first]}, "not according to"),
        ({"other": right[first], second: right[second]}, "not according to"),
        ({}, "weight_map"),
        ([], "weight_map"),
        (None, "weight_map"),
    ):
        put(folder, model__safetensors__index__json={"weight_map": weight_map})
        if message is None:  # a file that the index does not name is not opened
            assert set(open_checkpoint(folder).tensors) == {first}
            continue
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer_config.json", "chat_template.json"],
)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "{'a': 1}",
        '{"a": ' + "9" * 5000 + "}",
        "[" * 100_000,
        "\ufeff{}",
    ],
)
def test_broken_json_is_named(name: str, text: str, tmp_path: Path) -> None:
    folder = model(tmp_path)
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / name)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    folder = model(tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"ab\xff")
    with pytest.raises(CheckpointError, match="byte 2"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "qwen.tiktoken",
    ],
)
def test_git_lfs_pointers_are_explained(name: str, tmp_path: Path) -> None:
    folder = model(tmp_path)
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match="git lfs pull") as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / name)


def test_git_lfs_pointers_of_other_containers_are_explained(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "m.gguf"):
        folder = put(tmp_path / name[0], config__json={})
        (folder / name).write_text(POINTER)
        with pytest.raises(CheckpointError, match="git lfs pull"):
            open_checkpoint(folder)


def test_chat_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = model(tmp_path, tokenizer_config__json={"chat_template": named})
    assert open_checkpoint(folder).chat_template == "D"
    put(folder, tokenizer_config__json={"chat_template": named[:1]})
    assert open_checkpoint(folder).chat_template is None
    put(folder, chat_template__json={"chat_template": "J"})
    assert open_checkpoint(folder).chat_template == "J"
    put(folder, chat_template__jinja="{# 模板 #}")
    assert open_checkpoint(folder).chat_template == "{# 模板 #}"


@pytest.mark.parametrize("value", [3, {"default": "D"}, ["D"], [{"name": "default"}]])
def test_a_malformed_chat_template_is_named(value: Any, tmp_path: Path) -> None:
    folder = model(tmp_path, tokenizer_config__json={"chat_template": value})
    with pytest.raises(CheckpointError, match="chat_template"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, None),
        ({"LICENSE": "  Apache License\n  Version 2.0, January 2004"}, "apache-2.0"),
        ({"LICENSE": "MIT License\n\nCopyright"}, "mit"),
        ({"LICENSE": "Qwen RESEARCH LICENSE AGREEMENT"}, "qwen-research"),
        ({"LICENSE": "Tongyi Qianwen RESEARCH LICENSE AGREEMENT"}, "tongyi-qianwen-research"),
        ({"LICENSE": "Something else", "README__md": "---\nlicense: mit\n---\n"}, "mit"),
        (
            {"README__md": "---\nlicense: other\nlicense_name: 'tongyi-qianwen'\n---\n# x"},
            "tongyi-qianwen",
        ),
        ({"README__md": "# no head\nlicense: mit\n"}, None),
        ({"config__json": {"license": "bsd"}, "README__md": "---\nlicense: mit\n---\n"}, "bsd"),
    ],
)
def test_licences(files: dict[str, Any], licence: str | None, tmp_path: Path) -> None:
    assert open_checkpoint(model(tmp_path, **files)).licence == licence


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--Qwen--tiny"
    snapshot = repository / "snapshots" / "abc"
    plain = model(tmp_path / "plain", tokenizer_config__json={})
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(plain.iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert set(open_checkpoint(snapshot).tensors) == set(WEIGHTS)
    (tmp_path / "link").symlink_to(snapshot)
    assert set(open_checkpoint(tmp_path / "link").tensors) == set(WEIGHTS)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(plain / "model.safetensors")
    with pytest.raises(CheckpointError, match="leads out"):
        open_checkpoint(snapshot)


def test_links_are_followed_inside_the_folder_only(tmp_path: Path) -> None:
    outside, folder = model(tmp_path / "outside"), model(tmp_path / "folder")
    (folder / "model.safetensors").rename(folder / "real")
    (folder / "model.safetensors").symlink_to("real")
    assert set(open_checkpoint(folder).tensors) == set(WEIGHTS)
    for name in ("model.safetensors", "config.json", "LICENSE", "chat_template.jinja"):
        inside = folder / name
        inside.unlink(missing_ok=True)
        for target, message in (
            (outside / "config.json", "leads out"),
            (Path("../outside/config.json"), "leads out"),
            (Path("nowhere"), "points nowhere"),
            (Path(name), "points nowhere"),  # a loop
        ):
            inside.symlink_to(target)
            with pytest.raises(CheckpointError, match=message):
                open_checkpoint(folder)
            inside.unlink()
        if name == "model.safetensors":
            inside.symlink_to("real")
        elif name == "config.json":
            put(folder, config__json={})


def test_what_is_neither_file_nor_folder_is_called_so(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelNotFoundError, match="pipe: is not a regular file"):
        open_checkpoint(tmp_path / "pipe")
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nothing")
