"""Adapters in PEFT's layout: read and written back alike; what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_made import PROJECTIONS, adapter_tensors, write_made_adapter
from fakes import tiny_model
from qwenkit.adapter_files import read_adapter, write_adapter
from qwenkit.adapters.config import read_config
from qwenkit.adapters.lora import Merging
from qwenkit.adapters.peft_files import check_fits
from qwenkit.errors import (
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
    NonFiniteError,
    UsageError,
)
from tiny import write_tiny_checkpoint

MODEL = tiny_model()
FILE = "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_read_back_byte_for_byte(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {n: t.to(dtype) for n, t in adapter_tensors(MODEL, PROJECTIONS, 4).items()}
    folder = write_made_adapter(tmp_path / "a", MODEL, tensors=tensors, lora_dropout=0.1)
    write_adapter(read_adapter(folder), tmp_path / "b")
    write_adapter(read_adapter(tmp_path / "b"), tmp_path / "c")
    assert (tmp_path / "b" / FILE).read_bytes() == (tmp_path / "c" / FILE).read_bytes()
    texts = [(tmp_path / f / "adapter_config.json").read_text() for f in "abc"]
    assert json.loads(texts[0]) == json.loads(texts[1]) == json.loads(texts[2])
    again = read_adapter(tmp_path / "b").low_ranks
    assert len(again) == len(tensors) / 2
    for path, pair in again.items():
        assert torch.equal(pair.down, tensors[f"base_model.model.{path}.lora_A.weight"])
        assert torch.equal(pair.up, tensors[f"base_model.model.{path}.lora_B.weight"])
        assert pair.scaling == 2.0


def test_writing_takes_the_place_of_a_pickle(tmp_path: Path) -> None:
    adapter = read_adapter(write_made_adapter(tmp_path / "a", MODEL))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "adapter_model.bin").write_bytes(b"of another")
    write_adapter(adapter, tmp_path / "b")
    assert read_adapter(tmp_path / "b").low_ranks.keys() == adapter.low_ranks.keys()
    assert not (tmp_path / "b" / "adapter_model.bin").exists()


def test_a_folder_without_files_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"adapter_config\.json"):
        read_adapter(tmp_path)
    with pytest.raises(ModelNotFoundError):
        read_adapter(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: is missing"):
        read_adapter(tmp_path)


def test_a_file_that_is_none_is_refused_as_a_model_s_is(tmp_path: Path) -> None:
    folder = write_made_adapter(tmp_path, MODEL)
    (folder / FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(CheckpointError, match="git-LFS"):
        read_adapter(folder)
    (folder / FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match="code in it is never run"):
        read_adapter(folder)


BAD_TENSORS: dict[str, tuple[dict[str, torch.Tensor | None], type[Exception], str]] = {
    "half a pair": ({f"{Q}.lora_B.weight": None}, CheckpointError, r"lora_B\.weight: is missing"),
    "other rank": (
        {f"{Q}.lora_A.weight": torch.zeros(3, 32)},
        CheckpointError,
        r"has shape \(3, 32\); with rank 4",
    ),
    "no matrix": ({f"{Q}.lora_B.weight": torch.zeros(4)}, CheckpointError, r"has shape \(4,\)"),
    "integers": (
        {f"{Q}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int32)},
        CheckpointError,
        "not as plain numbers",
    ),
    "not a number": (
        {f"{Q}.lora_A.weight": torch.full((4, 32), torch.nan)},
        NonFiniteError,
        rf"{FILE}: {Q}\.lora_A\.weight",
    ),
    "infinite": (
        {f"{Q}.lora_B.weight": torch.full((32, 4), torch.inf)},
        NonFiniteError,
        r"lora_B\.weight",
    ),
    "no prefix": (
        {"q_proj.lora_A.weight": torch.zeros(4, 32)},
        CheckpointError,
        "base_model.model",
    ),
    "left over": ({f"{Q}.weight": torch.zeros(32, 32)}, CheckpointError, "speaks of"),
    "a bias": ({f"{Q}.bias": torch.zeros(32)}, CheckpointError, "speaks of"),
    "of an embedding": (
        {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 272)},
        CheckpointError,
        "not supported",
    ),
    "a magnitude": ({f"{Q}.lora_magnitude_vector": torch.zeros(32)}, CheckpointError, "supported"),
    "not targeted": (
        {
            "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32),
            "base_model.model.lm_head.lora_B.weight": torch.zeros(272, 4),
        },
        CheckpointError,
        "does not target",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_cannot_be_are_named(name: str, tmp_path: Path) -> None:
    changes, error, message = BAD_TENSORS[name]
    tensors = adapter_tensors(MODEL, PROJECTIONS, 4) | changes
    kept = {n: t for n, t in tensors.items() if t is not None}
    folder = write_made_adapter(tmp_path, MODEL, tensors=kept)
    with pytest.raises(error, match=message):
        read_adapter(folder)


BAD_CONFIGS: dict[str, dict[str, Any]] = {
    "peft_type": {"peft_type": "IA3"},
    "r": {"r": 0},
    "lora_alpha": {"lora_alpha": "much"},
    "target_modules": {"target_modules": None},
    "bias": {"bias": "some"},
    "use_dora": {"use_dora": True},
    "use_rslora": {"use_rslora": "yes"},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5]},
    "use_of_tomorrow": {"use_of_tomorrow": True},
    "layers_to_transform": {"layers_to_transform": "all"},
    "rank_pattern": {"rank_pattern": [1]},
    "base_model_name_or_path": {"base_model_name_or_path": 3},
    "modules_to_save": {"modules_to_save": "lm_head"},
}


@pytest.mark.parametrize("key", BAD_CONFIGS)
def test_keys_that_would_compute_something_else_are_named(key: str, tmp_path: Path) -> None:
    folder = write_made_adapter(tmp_path, MODEL, **BAD_CONFIGS[key])
    with pytest.raises(ConfigError, match=rf"adapter_config\.json: {key}: "):
        read_adapter(folder)


def test_a_pattern_that_takes_for_ever_or_is_none_ends() -> None:
    for pattern, message in (("(a|aa)+b", "takes too long"), ("(", "no regular")):
        config = read_config(CONFIG | {"target_modules": pattern})
        with pytest.raises(ConfigError, match=message):
            config.is_target("a" * 60 + "c")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    other = tiny_model(hidden_size=64)
    adapter = read_adapter(write_made_adapter(tmp_path / "size", other))
    with pytest.raises(CheckpointError, match=r"q_proj: is adapted as \(64, 64\), .* \(32, 32\)"):
        check_fits(adapter, MODEL)
    deeper = read_adapter(write_made_adapter(tmp_path / "deep", tiny_model(num_hidden_layers=3)))
    with pytest.raises(CheckpointError, match=r"layers\.2\.\S+: is not there in this model"):
        check_fits(deeper, MODEL)
    shallow = read_adapter(write_made_adapter(tmp_path / "less", MODEL))
    with pytest.raises(CheckpointError, match=r"layers\.2\.\S+: is missing, .* 6 more"):
        check_fits(shallow, tiny_model(num_hidden_layers=3))


def test_a_tied_head_and_quantized_weights_are_not_merged(tmp_path: Path) -> None:
    targets = [*PROJECTIONS, "lm_head"]
    adapter = read_adapter(write_made_adapter(tmp_path / "a", MODEL, targets=targets))
    with pytest.raises(UsageError, match="tie_word_embeddings"):
        Merging(adapter).check(MODEL, tied=MODEL.lm_head)
    Merging(adapter).check(MODEL, tied=None)


def test_adapters_of_single_experts_are_refused(tmp_path: Path) -> None:
    from qwenkit.load import load

    config = {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    }
    model = load(write_tiny_checkpoint(tmp_path / "m", config=config)).model
    path = "base_model.model.model.layers.0.mlp.experts.3.gate_proj"
    tensors = {f"{path}.lora_A.weight": torch.zeros(4, 32)}
    tensors[f"{path}.lora_B.weight"] = torch.zeros(32, 4)
    folder = write_made_adapter(tmp_path / "a", model, targets=["gate_proj"], tensors=tensors)
    with pytest.raises(CheckpointError, match="single experts"):
        check_fits(read_adapter(folder), model)
