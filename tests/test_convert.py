"""The first generation in Qwen2's layout, and back: the same numbers, or a refusal by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from first_generation import FIRST, first_tensors, write_first_generation
from qwenkit.api import LLM
from qwenkit.bench.random_model import write_random_gguf
from qwenkit.checkpoint import open_checkpoint
from qwenkit.convert import convert_folder
from qwenkit.errors import QwenkitError, TokenizerError, UsageError
from qwenkit.layers.attention import PackedCausal
from qwenkit.load import load
from tiny import CONFIG, tiny_tensors, write_tiny_checkpoint

MESSAGES = [{"role": "user", "content": "Hello"}]


def _logits(folder: Path, tokens: int) -> torch.Tensor:
    logits: torch.Tensor = load(folder).model(torch.arange(tokens), PackedCausal([tokens]))
    return logits


def test_to_qwen2_and_back(tmp_path: Path) -> None:
    first = write_first_generation(tmp_path / "first")
    convert_folder(first, tmp_path / "second", "qwen2", shard_bytes=20_000)
    near = 1e-5 * _logits(first, 64).abs().max().item()
    torch.testing.assert_close(
        _logits(tmp_path / "second", 64), _logits(first, 64), rtol=0, atol=near
    )
    config = json.loads((tmp_path / "second/config.json").read_text())
    assert config["max_position_embeddings"] == 64  # beyond it, NTK and LogN would be missing
    assert config["intermediate_size"] == 48
    convert_folder(tmp_path / "second", tmp_path / "third", "qwen")
    before, after = (open_checkpoint(tmp_path / name).tensors for name in ("first", "third"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name].read(), after[name].read()) for name in before)
    torch.testing.assert_close(_logits(tmp_path / "third", 64), _logits(first, 64))


def test_the_gate_is_w2(tmp_path: Path) -> None:
    first = write_first_generation(tmp_path / "first")
    convert_folder(first, tmp_path / "second", "qwen2")
    old, new = (open_checkpoint(tmp_path / name).tensors for name in ("first", "second"))
    for ours, theirs in (("w2", "gate_proj"), ("w1", "up_proj")):
        gate = new[f"model.layers.1.mlp.{theirs}.weight"].read()
        assert torch.equal(gate, old[f"transformer.h.1.mlp.{ours}.weight"].read())
    for number, letter in enumerate("qkv"):
        rows = old["transformer.h.0.attn.c_attn.bias"].read()[32 * number : 32 * (number + 1)]
        assert torch.equal(new[f"model.layers.0.self_attn.{letter}_proj.bias"].read(), rows)


def test_it_chats_alike(tmp_path: Path) -> None:
    first = write_first_generation(tmp_path / "first")
    convert_folder(first, tmp_path / "second", "qwen2")
    convert_folder(tmp_path / "second", tmp_path / "third", "qwen")
    rendered, stops, answers = set(), set(), set()
    for name in ("first", "second", "third"):
        with LLM(tmp_path / name) as llm:
            rendered.add(tuple(llm.render(MESSAGES).ids))
            stops.add(frozenset(llm.record.stop_token_ids))
            answers.add(llm.generate("Hi", {"temperature": 0, "max_tokens": 9}).token_ids)
    assert [len(found) for found in (rendered, stops, answers)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "num_key_value_heads"),
        ({"num_key_value_heads": 4, "head_dim": 16}, "head_dim"),
        (
            {"num_key_value_heads": 4, "use_sliding_window": True, "max_window_layers": 0},
            "use_sliding_window",
        ),
        (
            {"num_key_value_heads": 4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling",
        ),
    ],
)
def test_what_the_first_generation_cannot_do(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    source = write_tiny_checkpoint(
        tmp_path / "source", config=config, tensors=tiny_tensors(CONFIG | config)
    )
    with pytest.raises(UsageError, match=message):
        convert_folder(source, tmp_path / "target", "qwen")
    assert not (tmp_path / "target/model.safetensors").exists()


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    biased = FIRST | {"no_bias": False}
    source = write_first_generation(tmp_path / "a", config=biased, tensors=first_tensors(biased))
    load(source)
    with pytest.raises(UsageError, match="no_bias"):
        convert_folder(source, tmp_path / "target", "qwen2")
    plain = write_first_generation(tmp_path / "b")
    with pytest.raises(UsageError, match="'qwen' cannot become 'llama'"):
        convert_folder(plain, tmp_path / "target", "llama")
    with pytest.raises(UsageError, match=r"/b is a 'qwen' already; use it as it is\."):
        convert_folder(plain, tmp_path / "target", "qwen")
    write_random_gguf(tmp_path / "c.gguf", CONFIG | {"vocab_size": 300}, storage="F16")
    with pytest.raises(UsageError, match="plain weights"):
        convert_folder(tmp_path / "c.gguf", tmp_path / "target", "qwen")


def test_control_tokens_of_other_names_stay_where_they_are(tmp_path: Path) -> None:
    own = CONFIG | {"num_key_value_heads": 4}
    source = write_tiny_checkpoint(tmp_path / "source", config=own, tensors=tiny_tensors(own))
    convert_folder(source, tmp_path / "v1", "qwen")
    convert_folder(tmp_path / "v1", tmp_path / "v2", "qwen2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = tmp_path / "v2" / name
        file.write_text(file.read_text().replace("<|extra_3|>", "<tool_call>"))
    with pytest.raises((TokenizerError, QwenkitError), match="<tool_call>"):
        convert_folder(tmp_path / "v2", tmp_path / "v3", "qwen")
    assert not (tmp_path / "v3/model.safetensors").exists()
