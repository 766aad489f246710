"""A GGUF's metadata become the keys of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit.checkpoint import Checkpoint, open_checkpoint, write_gguf
from qwenkit.checkpoint.gguf_write import TensorEntry
from qwenkit.errors import CheckpointError

TOKENS = ["a", "b", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def keys(changes: dict[str, Any] | None = None, arch: str = "qwen2") -> dict[str, Any]:
    """Metadata of a small model; a change of None takes a key away."""
    base = {
        "general.architecture": arch,
        f"{arch}.block_count": 2,
        f"{arch}.context_length": 1024,
        f"{arch}.embedding_length": 8,
        f"{arch}.feed_forward_length": 24,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.eos_token_id": 4,
    }
    return {k: v for k, v in (base | (changes or {})).items() if v is not None}


def tensors(*names: str) -> list[TensorEntry]:
    rows: list[TensorEntry] = [("token_embd.weight", (6, 8), "F32", torch.zeros(6, 8))]
    return rows + [(name, (2,), "F32", torch.zeros(2)) for name in names]


def opened(folder: Path, metadata: dict[str, Any], *names: str) -> Checkpoint:
    file = folder / "tiny-q8_0.gguf"
    write_gguf(file, metadata, tensors(*names))
    return open_checkpoint(file)


def test_the_least_that_a_file_can_say(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, keys())
    assert checkpoint.name == "tiny-q8_0"
    assert checkpoint.container == "gguf"
    assert checkpoint.folder is None
    assert checkpoint.config == {
        "model_type": "qwen2",
        "num_hidden_layers": 2,
        "max_position_embeddings": 1024,
        "hidden_size": 8,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-6,
        "vocab_size": 6,  # rows of the embedding, not the five tokens
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": 4,
    }
    assert checkpoint.generation_config == {"eos_token_id": 4}
    assert checkpoint.tokenizer_config == {"eos_token_id": 4, "eos_token": "<|im_end|>"}
    assert checkpoint.chat_template is None
    assert checkpoint.licence is None
    assert checkpoint.gguf_metadata["tokenizer.ggml.tokens"] == TOKENS


def test_everything_that_a_file_can_say(tmp_path: Path) -> None:
    said = {
        "qwen2.attention.head_count_kv": [2, 2],  # one number a layer, all the same
        "qwen2.attention.key_length": 16,
        "qwen2.rope.freq_base": 1e6,
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32768,
        "qwen2.rope.scaling.attn_factor": 1.1,
        "general.license": "other",
        "general.license.name": "tongyi-qianwen",
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.8,
        "general.sampling.penalty_repeat": 1.05,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    checkpoint = opened(tmp_path, keys(said), "output.weight", "blk.0.attn_output.bias")
    config = checkpoint.config
    assert config["num_key_value_heads"] == 2
    assert config["head_dim"] == 16
    assert config["rope_theta"] == 1e6
    assert config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "attention_factor": 1.1,
    }
    assert config["tie_word_embeddings"] is False
    assert config["attention_bias"] is True
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (2, 4, 2)
    assert checkpoint.generation_config == {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
        "bos_token_id": 2,
        "eos_token_id": [4, 2],
        "pad_token_id": 2,
    }
    assert checkpoint.tokenizer_config["add_bos_token"] is False
    assert checkpoint.tokenizer_config["pad_token"] == "<|endoftext|>"
    assert checkpoint.chat_template == "{{ messages }}"
    assert checkpoint.licence == "tongyi-qianwen"


@pytest.mark.parametrize(
    ("arch", "model_type", "normalised"),
    [("qwen2moe", "qwen2_moe", False), ("qwen3moe", "qwen3_moe", True)],
)
def test_experts(arch: str, model_type: str, normalised: bool, tmp_path: Path) -> None:
    said = {
        f"{arch}.expert_count": 64,
        f"{arch}.expert_used_count": 8,
        f"{arch}.expert_feed_forward_length": 16,
        f"{arch}.expert_shared_feed_forward_length": 32,
    }
    config = opened(tmp_path, keys(said, arch)).config
    assert config["model_type"] == model_type
    assert (config["num_experts"], config["num_experts_per_tok"]) == (64, 8)
    assert config["moe_intermediate_size"] == 16
    assert config["shared_expert_intermediate_size"] == 32
    assert config["norm_topk_prob"] is normalised


def test_numbers_are_the_shortest_decimals_of_their_float32(tmp_path: Path) -> None:
    config = opened(tmp_path, keys({"qwen2.attention.layer_norm_rms_epsilon": 1e-5})).config
    assert config["rms_norm_eps"] == 1e-5  # widened bit by bit it would be 9.999999747378752e-06


REQUIRED = [
    "general.architecture",
    "qwen2.block_count",
    "qwen2.context_length",
    "qwen2.embedding_length",
    "qwen2.feed_forward_length",
    "qwen2.attention.head_count",
    "qwen2.attention.layer_norm_rms_epsilon",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing") as caught:
        opened(tmp_path, keys({key: None}))
    assert caught.value.field == key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.architecture", 3),
        ("qwen2.block_count", "two"),
        ("qwen2.block_count", -1),
        ("qwen2.block_count", True),
        ("qwen2.block_count", 2.0),
        ("qwen2.attention.head_count_kv", [2, 4]),
        ("qwen2.attention.layer_norm_rms_epsilon", "small"),
        ("qwen2.rope.scaling.type", 1),
        ("tokenizer.ggml.eos_token_id", 5),
        ("tokenizer.ggml.bos_token_id", -1),
        ("tokenizer.ggml.add_bos_token", 1),
        ("tokenizer.chat_template", 7),
        ("general.license", ["mit"]),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, keys({key: value}))
    assert caught.value.field == key


def test_an_embedding_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, keys(), [])
    with pytest.raises(CheckpointError, match=r"token_embd\.weight"):
        open_checkpoint(file)
