"""A mixture's experts in every layout that files have: one by one, stacked, quantized in a GGUF."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit.checkpoint import open_checkpoint, write_gguf, write_safetensors
from qwenkit.checkpoint.storages import TAGS
from qwenkit.errors import CheckpointError
from qwenkit.fill import fill
from qwenkit.formats.ggml import GgmlWeight
from qwenkit.layers.attention import PackedCausal
from qwenkit.layers.grouped import GroupedLinear
from qwenkit.layers.linear import Linear
from qwenkit.layers.weight import QuantWeight
from qwenkit.models.published import gguf_tensors, published_tensors
from qwenkit.models.spec import CausalModel, find

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [1],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"model_type": "llama"},
    "qwen2": SIZES | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": SIZES | {"model_type": "qwen3"},
    "qwen2_moe": SIZES
    | EXPERTS
    | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 64},
    "qwen3_moe": SIZES | EXPERTS | {"model_type": "qwen3_moe", "norm_topk_prob": True},
}
GGUF_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
}
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


def built(model_type: str) -> CausalModel:
    """A random model in fp32."""
    architecture = find(model_type)
    model = architecture.build(architecture.config(CONFIGS[model_type]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.requires_grad_(False).named_parameters():
        parameter.normal_(1 if "norm" in name else 0, 0.3, generator=generator)
    model.dtype = torch.float32
    return model


def quantize(model: CausalModel, storage: str) -> None:
    for module in model.modules():
        if isinstance(module, Linear | GroupedLinear) and module.out_features > 1:
            assert isinstance(module.weight, torch.Tensor)
            weight = GgmlWeight.quantize(module.weight.detach(), storage)
            del module.weight
            module.weight = weight


def write_folder(
    folder: Path, model_type: str, tensors: Mapping[str, torch.Tensor], **config: Any
) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIGS[model_type] | config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def write_file(file: Path, model_type: str, model: CausalModel, *leave_out: str) -> Path:
    """A GGUF of the model without a tokenizer."""
    architecture = find(model_type)
    config, arch = CONFIGS[model_type], architecture.gguf_arch
    keys = {f"{arch}.{key}": config[ours] for key, ours in GGUF_KEYS.items() if ours in config}
    write_gguf(
        file,
        {"general.architecture": arch} | {k: v for k, v in keys.items() if k not in leave_out},
        [
            (t.name, t.shape, t.storage or TAGS[t.tensor.dtype], t.tensor)
            for t in gguf_tensors(model, architecture)
        ],
    )
    return file


def published(model_type: str) -> dict[str, torch.Tensor]:
    return {t.name: t.tensor for t in published_tensors(built(model_type))}


def read(path: Path) -> CausalModel:
    checkpoint = open_checkpoint(path)
    architecture = find(checkpoint.config["model_type"])
    with torch.device("meta"):
        model = architecture.build(architecture.config(checkpoint.config))
    model.dtype = torch.float32
    fill(model, architecture, checkpoint)
    return model


def logits(model: CausalModel) -> torch.Tensor:
    ids = torch.randint(0, 97, (19,), generator=torch.Generator().manual_seed(1))
    result: torch.Tensor = model(ids, PackedCausal([19]))  # [19, vocab_size]
    return result


@pytest.mark.parametrize("model_type", CONFIGS)
def test_published_names_lead_back_to_the_same_model(model_type: str, tmp_path: Path) -> None:
    tensors = published(model_type)
    assert not any("experts.gate_proj" in name for name in tensors)
    assert ("lm_head.weight" in tensors) is not CONFIGS[model_type].get("tie_word_embeddings")
    again = read(write_folder(tmp_path, model_type, tensors))
    parameters = dict(again.named_parameters())
    for name, parameter in built(model_type).named_parameters():
        assert torch.equal(parameters.pop(name), parameter), name
    assert not parameters


@pytest.mark.parametrize("storage", [None, "Q8_0", "Q4_0"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_gguf_names_lead_back_to_the_same_model(
    model_type: str, storage: str | None, tmp_path: Path
) -> None:
    model = built(model_type)
    if storage is not None:
        quantize(model, storage)
    again = read(write_file(tmp_path / "m.gguf", model_type, model))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert torch.equal(logits(again), logits(model))
    if storage is not None and "moe" in model_type:
        weight = again.get_submodule("model.layers.0.mlp.experts.up_proj.weight")
        assert isinstance(weight, QuantWeight)
        assert weight.shape == (5 * 32, 64)


def test_quantized_experts_have_published_names_of_their_own() -> None:
    model = built("qwen2_moe")
    quantize(model, "Q8_0")
    named = {t.name: t for t in published_tensors(model)}
    expert = named[EXPERT]
    assert expert.storage == "Q8_0"
    assert expert.shape == (32, 64)
    weight = model.get_submodule("model.layers.2.mlp.experts.up_proj.weight")
    assert isinstance(weight, GgmlWeight)
    assert torch.equal(expert.tensor, weight.blocks[3 * 32 : 4 * 32])


def test_sizes_that_older_converters_left_out_come_from_the_tensors(tmp_path: Path) -> None:
    file = write_file(tmp_path / "m.gguf", "qwen2_moe", built("qwen2_moe"))
    config = open_checkpoint(file).config
    assert config["moe_intermediate_size"] == 32  # `write_file` gives neither of these
    assert config["shared_expert_intermediate_size"] == 64
    assert config["mlp_only_layers"] == [1]


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As transformers 5 holds the experts: one tensor of each kind, gate above up."""
    rest = {name: t for name, t in tensors.items() if ".experts." not in name}
    for layer in (0, 2):
        path = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors[f"{path}.{i}.{part}_proj.weight"] for i in range(5)])
            for part in ("gate", "up", "down")
        )
        rest[f"{path}.gate_up_proj"] = torch.cat([gate, up], 1)
        rest[f"{path}.down_proj"] = down
    return rest


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
def test_the_stacked_layout_is_the_same_model(model_type: str, tmp_path: Path) -> None:
    again = read(write_folder(tmp_path, model_type, stacked(published(model_type))))
    before, after = built(model_type).state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    # Not the same bits: where in memory a matrix begins changes how some processors add up.
    torch.testing.assert_close(logits(again), logits(built(model_type)), rtol=1e-5, atol=1e-5)


def test_local_experts_is_another_name_for_the_number(tmp_path: Path) -> None:
    config = {"num_experts": None, "num_local_experts": 5}
    read(write_folder(tmp_path, "qwen3_moe", published("qwen3_moe"), **config))


def _refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(write_folder(tmp_path, "qwen2_moe", tensors))
    return str(caught.value)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    tensors = published("qwen2_moe")
    del tensors[EXPERT]
    assert f"{EXPERT}: is missing" in _refused(tmp_path, tensors)


def test_an_expert_of_another_shape_is_named(tmp_path: Path) -> None:
    tensors = published("qwen2_moe") | {EXPERT: torch.zeros(31, 64)}
    assert f"{EXPERT}: has shape (31, 64); config.json asks for (32, 64)" in _refused(
        tmp_path, tensors
    )


def test_an_expert_stored_unlike_the_others_is_named(tmp_path: Path) -> None:
    tensors = published("qwen2_moe")
    tensors[EXPERT] = tensors[EXPERT].bfloat16()
    assert f"{EXPERT}: is stored as BF16, but" in _refused(tmp_path, tensors)


def test_one_expert_too_many_is_named(tmp_path: Path) -> None:
    extra = EXPERT.replace(".3.", ".5.")
    message = _refused(tmp_path, published("qwen2_moe") | {extra: torch.zeros(32, 64)})
    assert extra in message


def test_a_stack_of_another_shape_is_named(tmp_path: Path) -> None:
    tensors = stacked(published("qwen2_moe"))
    down = "model.layers.0.mlp.experts.down_proj"
    message = _refused(tmp_path, tensors | {down: tensors[down][:4]})
    assert f"{down}: has shape (4, 64, 32); config.json asks for (5, 64, 32)" in message


def test_a_stack_that_cannot_be_halved_is_left_over(tmp_path: Path) -> None:
    tensors = stacked(published("qwen2_moe"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    message = _refused(tmp_path, tensors | {name: tensors[name][:, :63]})
    assert "experts.0.gate_proj.weight: is missing" in message
