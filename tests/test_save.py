"""Saving: what was written opens as what was read, with tokenizer, template and defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from first_generation import write_first_generation
from qwenkit.api import LLM
from qwenkit.bench.random_model import write_random_gguf
from qwenkit.checkpoint import open_checkpoint
from qwenkit.errors import CheckpointError, UsageError
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import Loaded, load
from qwenkit.models.spec import find
from qwenkit.save import save_folder, save_gguf
from tiny import CONFIG, ENDOFTEXT, IM_END, write_tiny_checkpoint

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ALIBI = {"max_position_embeddings": None, "model_max_length": 64, "z_loss_weight": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen2 yarn": {
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    },
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": EXPERTS | {"head_dim": 16, "norm_topk_prob": True},
    "llama": {},
    "baichuan": ALIBI,
    "qwen": {},
}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
IDS = torch.randint(0, 480, (90,), generator=torch.Generator().manual_seed(3))


def _source(folder: Path, name: str) -> Path:
    model_type = name.split()[0]
    if model_type == "qwen":
        return write_first_generation(folder)
    config = CONFIG | CONFIGS[name] | {"model_type": model_type}
    architecture = find(model_type)
    model = architecture.build(architecture.config(config))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(float(parameter.ndim == 1), 0.3, generator=generator)
    own = tmp_named(model)
    generation = {"eos_token_id": [IM_END, ENDOFTEXT], "temperature": 0.6, "top_k": 20}
    return write_tiny_checkpoint(folder, config=config, tensors=own, generation=generation)


def tmp_named(model: Any) -> dict[str, torch.Tensor]:
    from qwenkit.models.published import published_tensors

    return {named.name: named.tensor.contiguous() for named in published_tensors(model)}


def _logits(loaded: Loaded) -> torch.Tensor:
    logits: torch.Tensor = loaded.model(IDS, PackedCausal([len(IDS)]))
    return logits


def _assert_same(one: Loaded, other: Loaded) -> None:
    """The same weights, bit for bit. Logits only nearly: where in memory a matrix begins changes
    how some processors add up.
    """
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    torch.testing.assert_close(_logits(one), _logits(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_reads_back_as_it_was(name: str, tmp_path: Path) -> None:
    first = load(_source(tmp_path / "first", name))
    files = save_folder(first, tmp_path / "second", shard_bytes=30_000)
    assert len(files) > 1
    second = load(tmp_path / "second")
    _assert_same(second, first)
    assert second.config == first.config
    assert second.record.sampling == first.record.sampling
    assert second.record.chat_format == first.record.chat_format
    assert second.record.stop_token_ids == first.record.stop_token_ids
    names = set(open_checkpoint(tmp_path / "first").tensors)
    assert set(open_checkpoint(tmp_path / "second").tensors) == names


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_reads_back_as_it_was(name: str, tmp_path: Path) -> None:
    first = load(_source(tmp_path / "first", name))
    save_gguf(first, tmp_path / "second.gguf")
    second = load(tmp_path / "second.gguf")
    if name == "baichuan":  # its head is written with rows of length one
        torch.testing.assert_close(_logits(second), _logits(first), rtol=1e-5, atol=1e-5)
        first = second
    _assert_same(second, first)
    assert second.config.position == first.config.position
    assert second.record.eos_token_id == first.record.eos_token_id
    assert set(second.record.stop_token_ids) == set(first.record.stop_token_ids)
    assert second.record.context_tokens == first.record.context_tokens
    for field in ("temperature", "top_k", "top_p"):
        ours, theirs = (getattr(x.record.sampling, field) for x in (first, second))
        assert theirs == pytest.approx(ours)
    save_folder(second, tmp_path / "third")
    third = load(tmp_path / "third")
    _assert_same(third, first)
    assert third.record.stop_token_ids == second.record.stop_token_ids


@pytest.mark.parametrize("name", ["qwen2", "qwen"])
def test_chats_are_rendered_alike(name: str, tmp_path: Path) -> None:
    folder = _source(tmp_path / "first", name)
    save_gguf(load(folder), tmp_path / "second.gguf")
    save_folder(load(tmp_path / "second.gguf"), tmp_path / "third")
    for messages in (MESSAGES, MESSAGES[1:]):
        rendered = []
        for path in (folder, tmp_path / "second.gguf", tmp_path / "third"):
            with LLM(path) as llm:
                rendered.append(tuple(llm.render(messages).ids))
        assert len(set(rendered)) == 1


def test_bf16_stays_bf16(tmp_path: Path) -> None:
    source = _source(tmp_path / "first", "qwen2")
    tensors = {n: t.read().bfloat16() for n, t in open_checkpoint(source).tensors.items()}
    write_tiny_checkpoint(tmp_path / "narrow", tensors=tensors)
    narrow = load(tmp_path / "narrow", dtype="float32")
    save_folder(narrow, tmp_path / "second")
    save_gguf(narrow, tmp_path / "second.gguf")
    again = open_checkpoint(tmp_path / "second")
    assert json.loads((tmp_path / "second/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {t.storage for t in again.tensors.values()} == {"BF16"}
    assert all(torch.equal(again.tensors[n].read(), tensors[n]) for n in tensors)
    gguf = open_checkpoint(tmp_path / "second.gguf").tensors.values()
    assert {t.storage for t in gguf} == {"BF16", "F32"}
    assert all((t.storage == "F32") is (len(t.shape) == 1) for t in gguf)


def test_blocks_stay_blocks_in_a_gguf_and_become_numbers_in_a_folder(tmp_path: Path) -> None:
    config = CONFIG | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300}
    write_random_gguf(tmp_path / "first.gguf", config, storage="Q4_0", head_storage="Q8_0")
    first = load(tmp_path / "first.gguf")
    save_gguf(first, tmp_path / "second.gguf")
    one, two = (open_checkpoint(tmp_path / f"{n}.gguf").tensors for n in ("first", "second"))
    assert {n: t.storage for n, t in one.items()} == {n: t.storage for n, t in two.items()}
    assert all(torch.equal(one[name].read(), two[name].read()) for name in one)
    save_folder(first, tmp_path / "third")
    ids = IDS % 300
    plain, blocks = (x.model(ids, PackedCausal([90])) for x in (load(tmp_path / "third"), first))
    torch.testing.assert_close(plain, blocks, rtol=0, atol=1e-4 * blocks.abs().max().item())


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    loaded = load(_source(tmp_path / "first", "qwen2"))
    with pytest.raises(UsageError, match="read from"):
        save_folder(loaded, tmp_path / "first")
    with pytest.raises(UsageError, match=r"storage: got 'Q4_0'"):
        save_gguf(loaded, tmp_path / "x.gguf", storage="Q4_0")
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    for change in (window, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}):
        folder = write_tiny_checkpoint(tmp_path / str(len(change)), config=change)
        with pytest.raises(UsageError, match="save a folder"):
            save_gguf(load(folder), tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
    with pytest.raises(UsageError, match=r"storage: got 4\. Allowed: BF16, F16, F32"):
        save_gguf(loaded, tmp_path / "x.gguf", storage=4)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="device: expected a name"):
        load(tmp_path / "first", device=5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="shard_bytes: got 'x'"):
        save_folder(loaded, tmp_path / "second", shard_bytes="x")  # type: ignore[arg-type]
    for wrong in (5, None, "", "a\0"):
        with pytest.raises(UsageError, match="folder: expected a path"):
            save_folder(loaded, wrong)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="path: expected a path"):
            load(wrong)  # type: ignore[arg-type]


def test_a_place_where_no_folder_can_be_is_our_error(tmp_path: Path) -> None:
    loaded = load(_source(tmp_path / "first", "qwen2"))
    file = tmp_path / "file"
    file.write_text("kept")
    for folder in (file, file / "below", "/proc/none/x"):
        with pytest.raises(CheckpointError, match=r"folder: cannot be written: .*; give another\."):
            save_folder(loaded, folder)
    for path in (tmp_path, file / "x.gguf", tmp_path / "gone" / "x.gguf"):
        with pytest.raises(CheckpointError, match="write: "):
            save_gguf(loaded, path)
    assert file.read_text() == "kept"


def test_paths_may_be_texts(tmp_path: Path) -> None:
    loaded = load(str(_source(tmp_path / "first", "qwen2")))
    save_folder(loaded, str(tmp_path / "second"))
    save_gguf(loaded, str(tmp_path / "x.gguf"))
    _assert_same(loaded, load(str(tmp_path / "second")))
    _assert_same(loaded, load(str(tmp_path / "x.gguf")))


def test_of_another_model_nothing_stays_that_would_be_read(tmp_path: Path) -> None:
    first = load(_source(tmp_path / "first", "qwen"))
    second = load(_source(tmp_path / "second", "qwen2"))
    target, kept = tmp_path / "target", ["README.md", "adapter_model.safetensors", "other.gguf"]
    save_folder(second, target, shard_bytes=20_000)
    old = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"]
    for name in [*kept, *old, "vocab.json", "merges.txt", "chat_template.json"]:
        (target / name).write_text("{}")
    (target / "tokenizer.json").symlink_to(tmp_path / "second" / "config.json")
    linked = (tmp_path / "second" / "config.json").read_bytes()
    save_folder(first, target)
    fresh = tmp_path / "fresh"
    save_folder(first, fresh)
    assert {p.name for p in target.iterdir()} == {p.name for p in fresh.iterdir()} | {*kept}
    _assert_same(first, load(target))
    assert (tmp_path / "second" / "config.json").read_bytes() == linked
    save_folder(second, target, shard_bytes=20_000)
    _assert_same(second, load(target))
    save_folder(second, target, shard_bytes=40_000)
    shards = sorted(p.name for p in target.glob("model-*.safetensors"))
    assert all(name.endswith(f"-of-{len(shards):05d}.safetensors") for name in shards)
